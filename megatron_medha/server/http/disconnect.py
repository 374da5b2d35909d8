"""Work on a large body for a client that may leave before it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.http.request_body import SMALL_BODY_BYTES

T = TypeVar("T")


async def unless_gone(request: Request, num_bytes: int, work: Coroutine[Any, Any, T]) -> T:
    """What `work` on so many bytes comes to; it is cancelled, and this is ApiError 400, once the client has gone.

    Clients with a timeout send a long document again and again; a million tokens of text keep a core busy for seconds.
    """
    if num_bytes <= SMALL_BODY_BYTES:
        return await work  # takes less time than it takes to look
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leave(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(400, "the client closed the connection", code="client_gone")  # heard by nobody
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _leave(request: Request) -> None:
    # The body has been read, so what comes next can only be the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        pass
