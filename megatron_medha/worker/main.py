"""A rank as a process: `python -m megatron_medha.worker.main '<RankConfig as JSON>'`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable

import msgspec
import zmq

from megatron_medha.cluster.messages import FromRank, Heartbeat, Loading, RankFailed, ToRank
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import MedhaError
from megatron_medha.worker.cpu_share import let_idle_threads_sleep, num_usable_cores

log = logging.getLogger("megatron_medha.worker")

_PR_SET_PDEATHSIG = 1
# How soon an orphan notices where the kernel does not tell it; an idle rank wakes up this often.
_PARENT_CHECK_MS = 1000
_GOODBYE_MS = 2000
_HEARTBEAT_S = 1.0


def main(argv: list[str]) -> int:
    """Serve until told to stop or left alone; 1 after an error, which the front is told about first."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("megatron_medha").setLevel(logging.INFO)
    # Megatron warns at import of every optional package (Apex, Transformer Engine, ...) it does without.
    # So does torch of interfaces that Megatron's checkpoint reader still uses.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    if len(argv) != 1:
        print("usage: python -m megatron_medha.worker.main '<RankConfig as JSON>'", file=sys.stderr)
        return 2
    parent_pid = os.getppid()
    _die_with_parent(parent_pid)
    # Ctrl-C reaches the whole process group; when and how ranks end is the front's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(argv[0], type=RankConfig)
    let_idle_threads_sleep(config.num_threads or num_usable_cores())

    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, f"rank-{config.rank}".encode())
    socket.setsockopt(zmq.LINGER, _GOODBYE_MS)
    socket.connect(config.front_endpoint)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromRank) -> None:
        socket.send(encoder.encode(message))

    is_over = threading.Event()
    heart = threading.Thread(target=_beat, args=(context, config, is_over), name="heartbeat", daemon=True)
    heart.start()
    try:
        _serve(config, socket, send, parent_pid)
        return 0
    except MedhaError as error:  # the user's fault: the front says it, a stack trace would only hide it
        send(RankFailed(config.rank, type(error).__name__, str(error)))
        return 1
    except Exception as error:  # outermost: the front must learn why, whatever it was
        log.exception("rank_failed")
        send(RankFailed(config.rank, type(error).__name__, str(error)))
        return 1
    finally:
        is_over.set()
        heart.join()
        socket.close()
        context.term()


def _serve(config: RankConfig, socket: zmq.Socket[bytes], send: Callable[[FromRank], None], parent_pid: int) -> None:
    """Load, report ready, answer messages until Shutdown or until the parent is gone."""
    send(Loading(config.rank, "libraries", 0.0))
    # Imported here: torch and Megatron take seconds, and the front should have heard from us by then.
    from megatron_medha.worker.load import load_rank
    from megatron_medha.worker.step_loop import run_steps

    rank, ready = load_rank(config, lambda what, fraction: send(Loading(config.rank, what, fraction)))
    send(ready)
    run_steps(rank, _FrontInbox(socket, parent_pid), send)


class _FrontInbox:
    """Messages of the front, for as long as the process that started this one lives."""

    def __init__(self, socket: zmq.Socket[bytes], parent_pid: int) -> None:
        self._socket, self._parent_pid = socket, parent_pid
        self._decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)

    def wait(self) -> ToRank | None:
        """See Inbox."""
        while not self._socket.poll(_PARENT_CHECK_MS):
            if os.getppid() != self._parent_pid:
                log.warning("parent_gone")
                return None
        return self._decoder.decode(self._socket.recv())

    def poll(self) -> ToRank | None:
        """See Inbox."""
        try:
            return self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None


def _beat(context: zmq.Context[zmq.Socket[bytes]], config: RankConfig, is_over: threading.Event) -> None:
    """Tell the front every second that this process runs, on a socket of its own: sockets belong to one thread."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, f"rank-{config.rank}-heartbeat".encode())
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(config.front_endpoint)
    beat = msgspec.msgpack.encode(Heartbeat(config.rank))
    while True:
        # A front that does not read gets no more than the socket's buffer holds; the rank goes on.
        try:
            socket.send(beat, zmq.NOBLOCK)
        except zmq.Again:
            log.warning("heartbeat_not_sent")
        if is_over.wait(_HEARTBEAT_S):
            socket.close()
            return


def _die_with_parent(parent_pid: int) -> None:
    """Ask Linux to end this process when the one that started it ends, however it ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it ended before we had asked
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
