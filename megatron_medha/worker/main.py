"""A rank as a process: `python -m megatron_medha.worker.main '<RankConfig as JSON>'`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable

import msgspec
import zmq

from megatron_medha.cluster.messages import FromRank, Loading, RankFailed, Shutdown, Step, ToRank
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import MedhaError
from megatron_medha.worker.cpu_share import let_idle_threads_sleep, num_usable_cores

log = logging.getLogger("megatron_medha.worker")

_PR_SET_PDEATHSIG = 1
# How soon an orphan notices where the kernel does not tell it; an idle rank wakes up this often.
_PARENT_CHECK_MS = 1000
_GOODBYE_MS = 2000


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
        socket.close()
        context.term()


def _serve(config: RankConfig, socket: zmq.Socket[bytes], send: Callable[[FromRank], None], parent_pid: int) -> None:
    """Load, report ready, answer messages until Shutdown or until the parent is gone."""
    send(Loading(config.rank, "libraries", 0.0))
    # Imported here: torch and Megatron take seconds, and the front should have heard from us by then.
    from megatron_medha.worker.load import load_rank

    rank, ready = load_rank(config, lambda what, fraction: send(Loading(config.rank, what, fraction)))
    send(ready)
    decoder = msgspec.msgpack.Decoder(ToRank)
    while True:
        if not socket.poll(_PARENT_CHECK_MS):
            if os.getppid() != parent_pid:
                log.warning("parent_gone")
                return
            continue
        message = decoder.decode(socket.recv())
        match message:
            case Step():
                started_s = time.monotonic()
                done = rank.run(message)
                send(msgspec.structs.replace(done, duration_s=time.monotonic() - started_s))
            case Shutdown():
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
