"""What signals do to the running server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any, cast

import pytest
import uvicorn
from fake_engine import WAIT_S

from megatron_medha.server.run_server import Server


async def _no_app(*_: Any) -> None:
    raise AssertionError("nobody asks")


def test_a_second_signal_ends_at_once_even_before_the_loop_has_seen_the_first() -> None:
    async def signalled() -> tuple[bool, bool]:
        server = Server(uvicorn.Config(_no_app), cast(Any, None), None)
        server._loop = asyncio.get_running_loop()  # as after startup()
        server.end = lambda: None  # type: ignore[method-assign]  # the loop does not get round to it
        server.handle_exit(signal.SIGINT, None)
        after_first = server.force_exit
        server.handle_exit(signal.SIGINT, None)
        return after_first, server.force_exit

    assert asyncio.run(signalled()) == (False, True)


# As `medha serve` has them once it listens; what comes then hangs.
STUCK = """
import ctypes, signal, sys, threading
from megatron_medha.cli.parts import stop_signals

stop_signals._HARD_EXIT_S = 0.5
stops = stop_signals.StopSignals()
stops.install_early_handlers()
if sys.argv[1] != "start":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)  # uvicorn's: to the loop, which does not come round
    stops.count(lambda: True, lambda: ": waiting")
    print("ready", flush=True)

def loop():
    while True:
        pass

def hold_the_lock():
    signal.sigwait({signal.SIGUSR1})
    ctypes.PyDLL(None).usleep(1 << 31)  # a C function that keeps the interpreter's lock

match sys.argv[1]:
    case "loop":
        loop()
    case "thread":
        threading.Thread(target=loop).start()
        threading.Event().wait()
    case "lock":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        thread = threading.Thread(target=hold_the_lock, daemon=True)
        thread.start()
        while stops.num_signals < 2:
            pass
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        thread.join()
    case "start":
        try:
            print("ready", flush=True)
            loop()
        except KeyboardInterrupt:
            print("once", flush=True)
        loop()
"""


@pytest.mark.parametrize("what", ["loop", "thread", "lock", "start"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_server_in_which_something_hangs(what: str, number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK, what], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(number)
            if what == "start":
                assert process.stdout.readline() == "once\n"
            else:
                assert process.stdout.readline() == "\n"
                assert process.stdout.readline() == "stopping: waiting\n"
            process.send_signal(number)
            assert process.wait(WAIT_S) == (1 if what == "lock" else 130)
        finally:
            process.kill()
