"""What signals do to the running server."""

from __future__ import annotations

import asyncio
import signal
from typing import Any, cast

import uvicorn

from megatron_medha.server.running import Server


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
