"""From the bytes of a body to its type, however large it is: nothing is built before it is counted, nothing in one go.

A small body is decoded as it is. Of a large one the prompt's own text and token ids are cut out (json_scan.py) and
decoded by slices; what is left is bounded in bytes and in values, so that decoding it takes a few milliseconds.
A thread would not help: a decoder holds the interpreter's lock while it works.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.http.json_scan import (
    SLICE_BYTES,
    BodyScan,
    Cut,
    Path,
    ScanRules,
    invalid_json,
    too_much,
)

T = TypeVar("T")

WHOLE_BYTES = 256 * 2**10       # a body up to this long is decoded in one go: 10 ms whatever it holds
MAX_VALUES = 65_536             # of a larger one: 13,000 messages; decoding so many takes some 10 ms
MAX_REST_BYTES = 4 * 2**20      # beside the prompt's own text and ids: decoding so much takes 10 ms
_SHORT_TEXTS_BYTES = 2**20      # in a body up to this long texts stay where they are
_MIN_CUT_BYTES = 128            # in a longer one, texts from this length on are cut out

_MAX_TIMES_RENDERED = 4         # the texts of a chat may be so many times longer than the prompt that they become

_IDS_DECODER = msgspec.json.Decoder(list[int])
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")


@dataclass(frozen=True, slots=True)
class BodyType(Generic[T]):
    """The type of a route's body, and which of its fields hold the prompt's text or token ids."""

    decoder: msgspec.json.Decoder[T]
    texts: frozenset[str] = frozenset()
    ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What fits the model's context: more of either cannot, and is not built."""

    num_tokens: int
    num_chars: int


async def decode_request(body: bytearray, of: BodyType[T], limits: PromptLimits) -> T:
    """The body as its type, a long list of ids as an array; ApiError 4xx says what is wrong. `body` is emptied."""
    if len(body) <= WHOLE_BYTES:
        return decode_body(body, of.decoder)
    try:
        return await _run(_decode_large(body, of, limits))
    finally:
        await _empty(body)


async def _empty(body: bytearray) -> None:
    """Give its memory back by halves: 128 MiB at once are 40 ms."""
    while len(body) > SLICE_BYTES:
        del body[len(body) // 2 :]
        await asyncio.sleep(0)
    body.clear()


def decode_body(body: bytes | bytearray, decoder: msgspec.json.Decoder[T]) -> T:
    """A small body as its type; ApiError 400 naming the field that is wrong."""
    if not body.strip():
        raise bad_request("the body is empty; expected a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        missing = what.partition("missing required field `")[2]
        param = ".".join(part.rstrip("`") for part in (path, missing) if part) or None
        raise bad_request(f"{param}: {what[0].lower()}{what[1:]}" if param else what, param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid_json(error) from None
    except RecursionError:
        raise invalid_json("nested too deeply") from None


async def _run(steps: Generator[None, None, T]) -> T:
    """Go through these, and let others run after each."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        await asyncio.sleep(0)


def _decode_large(body: bytearray, of: BodyType[T], limits: PromptLimits) -> Generator[None, None, T]:
    min_cut = _MIN_CUT_BYTES if len(body) > _SHORT_TEXTS_BYTES else len(body)
    rules = ScanRules(
        texts=of.texts, ids=of.ids, max_values=MAX_VALUES, max_bytes=MAX_REST_BYTES, min_cut_bytes=min_cut
    )
    scanned = yield from BodyScan(body, rules).run()
    yield
    fields = decode_body(scanned.rest, of.decoder)
    yield
    num_chars: dict[object, int] = defaultdict(int)  # of each prompt
    for number, cut in enumerate(scanned.cuts):
        owner = _find(fields, cut.path[:-1])
        if _get(owner, cut.path[-1]) != cut.mark:
            continue  # in a field that is not known here, or one that is there twice
        if isinstance(cut.mark, str):
            # A field that may be ids instead holds prompts; in others all texts are one prompt, less what the chat
            # template leaves out, such as the reasoning of earlier turns.
            is_prompt = cut.path[0] in of.ids
            prompt, times = (cut.path, 1) if is_prompt else (None, _MAX_TIMES_RENDERED)
            text = yield from _decode_text(body, cut, times * limits.num_chars - num_chars[prompt])
            num_chars[prompt] += len(text)
            _put(owner, cut.path[-1], text)
        else:
            _put(owner, cut.path[-1], (yield from _decode_ids(body, cut, limits.num_tokens)))
        if number % 256 == 255:
            yield
    return fields


def _decode_text(body: bytearray, cut: Cut, max_chars: int) -> Generator[None, None, str]:
    parts: list[str] = []
    num_chars, position, end = 0, cut.begin + 1, cut.end - 1
    while position < end:
        part = body[position : min(position + SLICE_BYTES, end)]
        num_bytes = len(part) if position + len(part) == end else _num_whole_bytes(part)
        part[num_bytes:] = b'"'
        part[:0] = b'"'
        try:
            parts.append(msgspec.json.decode(part, type=str))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise invalid_json(error) from None
        num_chars += len(parts[-1])
        if num_chars > max_chars:
            raise _prompt_too_long(cut, "the text has")
        position += num_bytes
        if position < end:
            yield
    return "".join(parts)


def _num_whole_bytes(part: bytearray) -> int:
    """How many bytes of a slice of JSON text can be decoded by themselves: no character or escape is cut in two."""
    end = len(part)
    flat = part.replace(b"\\\\", b"__") if b"\\" in part else part  # the slice begins outside of escapes
    escape = flat.rfind(b"\\", end - 6)
    if escape >= 0:
        end = escape
    elif part[-1] >= 0x80:
        # A character has four bytes at most; where none of the last four begins one, the decoder says so.
        end = next((end - back for back in range(1, 5) if part[end - back] >= 0xC0), end)
    high = _HIGH_SURROGATE.search(flat, end - 6, end)
    return end if high is None else high.start()


def _decode_ids(body: bytearray, cut: Cut, max_ids: int) -> Generator[None, None, array[int]]:
    ids = array("i")
    position, end = cut.begin + 1, cut.end - 1
    while position < end:
        comma = body.find(b",", min(position + SLICE_BYTES, end), end)
        slice_end = comma if comma >= 0 else end
        try:
            numbers = _IDS_DECODER.decode(b"[" + body[position:slice_end] + b"]")
        except msgspec.ValidationError as error:
            raise bad_request(f"{cut.path[0]}: {error}", str(cut.path[0])) from None
        except msgspec.DecodeError as error:
            raise invalid_json(error) from None
        try:
            ids.extend(numbers)
        except OverflowError:
            wrong = str(max(numbers, key=abs))
            wrong = wrong if len(wrong) <= 20 else f"of {len(wrong)} digits"
            raise bad_request(f"{cut.path[0]}: token id {wrong} is outside the vocabulary", str(cut.path[0])) from None
        if len(ids) > max_ids:
            raise _prompt_too_long(cut, f"these are at least {len(ids)} ids:")
        position = slice_end + 1
        if position < end:
            yield
    return ids


def _find(owner: Any, path: Path) -> Any:
    for place in path:
        owner = _get(owner, place)
    return owner


def _get(owner: Any, place: str | int) -> Any:
    match owner:
        case msgspec.Struct():
            name = _attribute(owner, place)
            return None if name is None else getattr(owner, name)
        case dict():
            return owner.get(place)
        case list() if isinstance(place, int) and place < len(owner):
            return owner[place]
        case _:
            return None


def _put(owner: Any, place: str | int, value: Any) -> None:
    if isinstance(owner, msgspec.Struct):
        name = _attribute(owner, place)
        assert name is not None, "a mark was found there"
        setattr(owner, name, value)
    else:
        owner[place] = value


def _attribute(owner: msgspec.Struct, place: str | int) -> str | None:
    names: dict[str | int, str] = dict(zip(owner.__struct_encode_fields__, owner.__struct_fields__, strict=True))
    return names.get(place)


def _prompt_too_long(cut: Cut, what: str) -> ApiError:
    return too_much(str(cut.path[0]), f"{what} more tokens than the model's context", "context_length_exceeded")
