"""Sixty-four streams read at once by a client that does no more than note when each token came."""

from __future__ import annotations

import asyncio
import re
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from experiments.lib.http_stream import post

NUM_STREAMS = 64
PROMPT = "a prompt of some words"
_END_OF_EVENT = b"}\n\n"
_ID = re.compile(rb'"id": ?"([^"]+)"')


@dataclass(frozen=True, slots=True)
class Received:
    """One stream: the server's name for the answer, and when each of its tokens came, on the monotonic clock."""

    response_id: str
    times_s: array[float]


async def read_streams(port: int, num_tokens: int, count: Callable[[bytes], int]) -> list[Received]:
    """All streams at once, each of so many tokens. count: tokens in the whole events it is given."""
    return await asyncio.gather(*(_read(port, num_tokens, count) for _ in range(NUM_STREAMS)))


async def _read(port: int, num_tokens: int, count: Callable[[bytes], int]) -> Received:
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    reader, writer = await post(port, body)
    times_s = array("d")
    whole = rest = b""
    response_id: re.Match[bytes] | None = None
    while part := await reader.read(1 << 16):
        now_s = time.monotonic()
        whole = rest + part
        end = whole.rfind(_END_OF_EVENT) + len(_END_OF_EVENT)
        if end < len(_END_OF_EVENT):
            rest = whole
            continue
        if response_id is None:
            response_id = _ID.search(whole)
        times_s.extend([now_s] * count(whole[:end]))
        rest = whole[end:]
    writer.close()
    if len(times_s) != num_tokens or response_id is None:
        raise SystemExit(f"a stream brought {len(times_s)} tokens, not {num_tokens}: {whole[-300:]!r}")
    return Received(response_id[1].decode(), times_s)


def count_events(events: bytes) -> int:
    """Of a server that sends an event per token."""
    return events.count(_END_OF_EVENT)
