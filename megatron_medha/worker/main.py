"""A rank as a process: `python -m megatron_medha.worker.main '<RankConfig as JSON>'`.

`python -m megatron_medha.worker.main --attach tcp://HOST:PORT --key FILE` instead waits for an API server elsewhere
to say what to be, and starts that rank (cluster/remote/agent.py).
"""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from megatron_medha.cluster.curve_keys import CurveKeys
from megatron_medha.cluster.messages import (
    FromRank,
    GrammarPrepared,
    Heartbeat,
    PrepareGrammar,
    RankFailed,
    RankLoading,
    RankReady,
    StepDone,
)
from megatron_medha.cluster.rank_config import RankConfig, connection_name
from megatron_medha.core.errors import MedhaError
from megatron_medha.system.libc import TRIM_INTERVAL_S, malloc_trim, set_pdeathsig
from megatron_medha.worker.message_inbox import MessageInbox, SocketInbox
from megatron_medha.worker.startup.cpu_share import (
    give_way,
    limit_kernel_cache,
    num_threads_of_rank,
    set_passive_omp_wait,
)
from megatron_medha.worker.startup.gpu_environment import set_gpu_environment

log = logging.getLogger("megatron_medha.worker")


Serve = Callable[[MessageInbox, Callable[[StepDone], None]], None]  # takes steps, answers, until told to stop


class LoadedRank(NamedTuple):
    """A rank that is up."""

    serve: Serve
    ready: RankReady
    prepare: Callable[[str], None]  # compiles a grammar; called on a thread of its own, beside `serve`


LoadRank = Callable[[RankConfig, Callable[[str, float], None]], LoadedRank]

_LINGER_MS = 2000
_HEARTBEAT_INTERVAL_S = 1.0
_GRAMMAR_CHARS_PER_S = 200  # one of 1,000 characters lets shorter ones go first that come within 5 s


def main(argv: list[str], load: LoadRank | None = None) -> int:
    """Serve until stopped or left alone; 1 after an error, which is sent to the API server first.

    load: brings the rank up; by default the model's (worker/startup/load.py).
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("megatron_medha").setLevel(logging.INFO)
    # Megatron warns at import of every optional package (Apex, Transformer Engine, ...) it does without.
    # So does torch of interfaces that Megatron's checkpoint reader still uses.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    if argv and argv[0] == "--attach":
        from megatron_medha.cluster.remote.agent import attach

        return attach(argv)
    if len(argv) != 1:
        print(
            "usage: python -m megatron_medha.worker.main '<RankConfig as JSON>'\n"
            "       python -m megatron_medha.worker.main --attach tcp://HOST:PORT --key FILE",
            file=sys.stderr,
        )
        return 2
    parent_pid = os.getppid()
    set_pdeathsig(parent_pid)
    # Ctrl-C reaches the whole process group; when and how ranks end is the API server's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(argv[0], type=RankConfig)
    set_passive_omp_wait(num_threads_of_rank(config.model.num_threads, config.layout.world_size))
    limit_kernel_cache()

    context = zmq.Context()
    socket = _connect(context, config, "")
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromRank) -> None:
        socket.send(encoder.encode(message))

    try:
        with _heartbeats(context, config):
            _serve(config, context, socket, send, parent_pid, load or _load_model)
        return 0
    except Exception as error:  # outermost: the API server must learn why, whatever it was
        if not isinstance(error, MedhaError):  # the user's fault: a stack trace would only hide it
            log.exception("rank_failed")
        send(RankFailed(config.rank, type(error).__name__, str(error)))
        return 1
    finally:
        socket.close()
        context.term()


def _load_model(config: RankConfig, progress: Callable[[str, float], None]) -> LoadedRank:
    # Imported here: torch and Megatron take seconds, and the API server should have heard from us by then.
    from megatron_medha.worker.startup.megatron_import import import_megatron

    if config.model.device != "cpu":
        set_gpu_environment(os.environ)
    else:  # not the threads that messages pass through: they run already
        num_ranks = config.layout.world_size
        give_way(num_threads_of_rank(config.model.num_threads, num_ranks), num_ranks)
    import_megatron(config.model.device)
    from megatron_medha.worker.startup.load import load_rank
    from megatron_medha.worker.step_loop import run_steps

    rank, ready = load_rank(config, progress)
    return LoadedRank(partial(run_steps, rank), ready, rank.prepare)


def _serve(
    config: RankConfig,
    context: zmq.Context[zmq.Socket[bytes]],
    socket: zmq.Socket[bytes],
    send: Callable[[FromRank], None],
    parent_pid: int,
    load: LoadRank,
) -> None:
    """Load, report ready, answer messages until Shutdown or until the parent is gone."""
    send(RankLoading(config.rank, "importing torch and megatron-core", 0.0))
    serve, ready, prepare = load(config, lambda what, fraction: send(RankLoading(config.rank, what, fraction)))
    with _preparing(context, config, prepare) as take, _trimming_memory():
        send(ready)
        serve(SocketInbox(socket, parent_pid, take), send)


def _connect(context: zmq.Context[zmq.Socket[bytes]], config: RankConfig, what: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, connection_name(config.rank, what, config.link_token))
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    if config.key_file is not None:
        CurveKeys.load(Path(config.key_file)).secure_rank_socket(socket)
    socket.connect(config.server_endpoint)
    return socket


@contextmanager
def _background_thread(name: str, work: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Does `work` on a thread of its own; `end` is called for it to return."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end()
        thread.join()


def _heartbeats(context: zmq.Context[zmq.Socket[bytes]], config: RankConfig) -> AbstractContextManager[None]:
    """Tell the API server that the process runs, over a socket of the thread's own."""
    stop = threading.Event()

    def beat() -> None:
        socket = _connect(context, config, "heartbeat")
        message = msgspec.msgpack.encode(Heartbeat(config.rank))
        while not stop.is_set():
            # An API server that does not read gets no more than the socket's buffer holds; the rank goes on.
            try:
                socket.send(message, zmq.NOBLOCK)
            except zmq.Again:
                log.warning("heartbeat_not_sent")
            stop.wait(_HEARTBEAT_INTERVAL_S)
        socket.close(linger=0)

    return _background_thread("heartbeat", beat, stop.set)


def _trimming_memory() -> AbstractContextManager[None]:
    """On a thread: it takes milliseconds, which steps need not wait for."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(TRIM_INTERVAL_S):
            malloc_trim()

    return _background_thread("memory", work, stop.set)


@contextmanager
def _preparing(
    context: zmq.Context[zmq.Socket[bytes]], config: RankConfig, prepare: Callable[[str], None]
) -> Iterator[Callable[[PrepareGrammar], None]]:
    """Takes grammars, compiles one after the other on a thread, and tells the API server over a socket of its own.

    A short one goes before long ones that came up to some seconds earlier, as those may take long.
    """
    waiting: queue.PriorityQueue[tuple[float, int, PrepareGrammar | None]] = queue.PriorityQueue()

    def take(message: PrepareGrammar) -> None:
        waiting.put((time.monotonic() + len(message.grammar) / _GRAMMAR_CHARS_PER_S, message.number, message))

    def work() -> None:
        socket = _connect(context, config, "grammars")
        while (message := waiting.get()[2]) is not None:
            try:
                prepare(message.grammar)
            except Exception as error:  # outermost, as in main(): nobody else would say so
                log.exception("grammar_thread_failed")
                socket.send(msgspec.msgpack.encode(RankFailed(config.rank, type(error).__name__, str(error))))
                break
            socket.send(msgspec.msgpack.encode(GrammarPrepared(config.rank, message.number)))
        socket.close()

    with _background_thread("grammars", work, lambda: waiting.put((-math.inf, 0, None))):
        yield take


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
