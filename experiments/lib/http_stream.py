"""A streaming completion client with nothing between the socket and the clock: one connection per request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Streamed:
    """What a client saw of one request; times are of one monotonic clock."""

    num_prompt_tokens: int
    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Sent to first token."""
        return self.token_times_s[0] - self.sent_s

    @property
    def end_s(self) -> float:
        """When the last token came."""
        return self.token_times_s[-1]


async def post(port: int, body: Mapping[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A completion request on a connection of its own."""
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)  # fmt: skip
    return reader, writer


async def complete(
    port: int,
    prompt: list[int],
    max_tokens: int,
    timeout_s: float = 600.0,
    *,
    may_join_tokens: bool = False,
    on_token: Callable[[], object] = lambda: None,
    fields: Mapping[str, object] | None = None,
) -> Streamed:
    """One greedy streaming completion of exactly `max_tokens` tokens; on_token is called at each piece.

    may_join_tokens: several may come in one piece, as some servers send them when they are short of CPU; and a piece
    without text is none, as some end a stream with one.
    fields: more of the request's body, for what a server has beyond OpenAI's API.
    """
    body: dict[str, object] = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    result = Streamed(len(prompt), time.monotonic())
    async with asyncio.timeout(timeout_s):
        reader, writer = await post(port, {**body, "stream": True, **(fields or {})})
        try:
            await writer.drain()
            status = (await reader.readline()).split()[1]
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    now_s = time.monotonic()
                    event = json.loads(line[6:])
                    if "error" in event:
                        result.error = event["error"]["message"]
                    elif event.get("choices") and (event["choices"][0]["text"] or not may_join_tokens):
                        result.token_times_s.append(now_s)
                        result.text += event["choices"][0]["text"]
                        on_token()
                elif status != b"200" and line.startswith(b"{"):
                    result.error = line.decode()
        finally:
            writer.close()
    num_pieces = len(result.token_times_s)
    is_whole = 0 < num_pieces <= max_tokens if may_join_tokens else num_pieces == max_tokens
    if result.error is None and not is_whole:
        result.error = f"{num_pieces} tokens instead of {max_tokens}"
    return result


async def answered(port: int, prompt: list[int], max_tokens: int, **options: Any) -> Streamed:
    """As complete(); a request that fails ends the experiment, as its figures would mean nothing."""
    result = await complete(port, prompt, max_tokens, **options)
    if result.error is not None:
        raise SystemExit(f"a request of {len(prompt)} tokens failed: {result.error}")
    return result
