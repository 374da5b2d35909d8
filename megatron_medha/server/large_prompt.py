"""Bodies with a prompt of very many token ids: decoded slice by slice, so that the event loop serves others between.

A thread would not help: the decoder holds the interpreter's lock while it works, 50 ms for a million ids.
"""

from __future__ import annotations

import asyncio
from array import array

import msgspec

from megatron_medha.server.openai_types import CompletionRequest
from megatron_medha.server.request_fields import decode_body

MIN_BYTES = 256 * 2**10   # smaller bodies take 2 ms at most
SLICE_BYTES = 64 * 2**10  # some 13,000 ids: half a millisecond

_OF_FLAT_IDS = b"0123456789-, \t\r\n"


class _LargeRequest(CompletionRequest, kw_only=True):
    """The same with its prompt left as it was sent, checked to be JSON."""

    prompt: msgspec.Raw  # type: ignore[assignment]  # until it is decoded


_DECODER = msgspec.json.Decoder(CompletionRequest)
_LARGE_DECODER = msgspec.json.Decoder(_LargeRequest)
_IDS_DECODER = msgspec.json.Decoder(list[int])


async def decode_completion(body: bytes) -> CompletionRequest:
    """The body of /v1/completions; ApiError 400 as decode_body. A long list of ids comes as an array."""
    if len(body) < MIN_BYTES:
        return decode_body(body, _DECODER)
    request = decode_body(body, _LARGE_DECODER)
    raw = bytes(request.prompt).strip()
    if raw.translate(None, _OF_FLAT_IDS) != b"[]":
        return decode_body(body, _DECODER)  # text, or several prompts
    try:
        ids = await _decode_ids(raw)
    except OverflowError:
        return decode_body(body, _DECODER)  # an id of more than 32 bits: checked, and named, where all ids are
    request.prompt = ids  # type: ignore[assignment]  # a prompt may be an array from here on
    return request


async def _decode_ids(raw: bytes) -> array[int]:
    ids = array("i")
    begin, last = 1, len(raw) - 1
    while begin < last:
        end = raw.find(b",", begin + SLICE_BYTES)
        if end < 0:
            end = last
        ids.extend(_IDS_DECODER.decode(b"[" + raw[begin:end] + b"]"))
        begin = end + 1
        await asyncio.sleep(0)
    return ids
