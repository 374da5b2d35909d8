"""Reading a request's body, with a bound on what all bodies hold in memory until their requests are admitted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.server_config import ServerConfig

# Not counted: small bodies always get in, and all connections together are 1 GiB of them.
SMALL_BODY_BYTES = 64 * 2**10


@dataclass(slots=True)
class BodyBudget:
    """Bytes of large bodies until their requests are admitted, and of text that a thread still works on."""

    config: Callable[[], ServerConfig]
    num_bytes: int = 0


class BodyMemory:
    """What one request holds until its admission, for a with statement; server.max_total_body_bytes limits the sum."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def __enter__(self) -> BodyMemory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.num_bytes > SMALL_BODY_BYTES:
            self._budget.num_bytes -= self.num_bytes

    def grow_to(self, num_bytes: int) -> None:
        """It is so much now; ApiError 503 if there is no room for that."""
        if num_bytes > SMALL_BODY_BYTES:
            budget, config = self._budget, self._budget.config()
            num_more = num_bytes - (self.num_bytes if self.num_bytes > SMALL_BODY_BYTES else 0)
            if budget.num_bytes + num_more > config.max_total_body_bytes:
                raise ApiError(
                    503,
                    f"requests that are not admitted yet hold {budget.num_bytes} bytes, {num_more} more are "
                    f"too many (server.max_total_body_bytes={config.max_total_body_bytes})",
                    code="bodies_waiting",
                    retry_after_s=config.retry_after_s,
                    headers={"connection": "close"},
                )
            budget.num_bytes += num_more
        self.num_bytes = num_bytes


async def read_body(request: Request, config: ServerConfig, memory: BodyMemory) -> bytearray:
    """The whole body; ApiError 413 if it is too large, 408 if it does not come, 503 if others' leave no room for it."""
    body = bytearray()
    num_bytes = 0
    is_too_large = False
    try:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(config.body_timeout_s) as patience:
            async for part in request.stream():
                patience.reschedule(loop.time() + config.body_timeout_s)
                num_bytes += len(part)
                # What is too large is read on for a while and forgotten: a client that is still
                # sending when the connection closes never sees the response.
                is_too_large = is_too_large or num_bytes > config.max_body_bytes
                if not is_too_large:
                    memory.grow_to(num_bytes)
                    body += part
                elif num_bytes > 2 * config.max_body_bytes:
                    break
    except TimeoutError:
        raise ApiError(
            408, f"nothing more of the body arrived within {config.body_timeout_s:g} s", headers={"connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client closed the connection before its body was complete") from None
    if is_too_large:
        raise ApiError(
            413,
            f"the body exceeds the limit of {config.max_body_bytes} bytes",
            code="body_too_large",
            headers={"connection": "close"},
        )
    return body
