"""What the two kinds of completion differ in: how pieces of text become JSON."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from megatron_medha.server.bodies.openai_types import Usage
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.http.routing import encode_json
from megatron_medha.server.openai.openai_logprobs import token_namer
from megatron_medha.text.tokenizer import Tokenizer

DONE_EVENT = b"data: [DONE]\n\n"
_SLICE_ITEMS = 2_048   # encoded in one call, which holds the interpreter's lock: 3 ms of log-probabilities at most
_SLICE_CHARS = 65_536


def as_sliced_json(whole: list[Any] | array[int] | str) -> Any:
    """A list or text to encode; a long one as its JSON, encoded by slices so that other threads run between them."""
    is_text = isinstance(whole, str)
    size = _SLICE_CHARS if is_text else _SLICE_ITEMS
    if len(whole) <= size:
        return list(whole) if isinstance(whole, array) else whole
    slices = (whole[begin : begin + size] for begin in range(0, len(whole), size))
    parts = [encode_json(part if is_text else list(part))[1:-1] for part in slices]
    return msgspec.Raw(b'"%b"' % b"".join(parts) if is_text else b"[%b]" % b",".join(parts))


class WireFormat(Protocol):
    """JSON for one HTTP request."""

    spec: GenerationSpec

    def opening_events(self) -> Sequence[bytes]:
        """Events before the first token."""

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """The event of one token, none or several; usage where the client wants it in every event."""

    def closing_events(self, usage: Usage) -> Sequence[bytes]:
        """Events after the last token."""

    def error_events(self, error: ApiError) -> Sequence[bytes]:
        """Events that end a stream which has begun."""

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The response that is not a stream."""


def sse_event(body: object) -> bytes:
    """One server-sent event holding this object as JSON."""
    return b"data: " + encode_json(body) + b"\n\n"


class TokenFormat:
    """The part of a WireFormat that is the same in /v1/completions and /v1/chat/completions: an event is a token."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._name = token_namer(tokenizer, by_id=spec.names_tokens_by_id)
        self._is_plain = not (spec.has_logprobs or spec.has_continuous_usage or spec.returns_token_ids)

    def closing_events(self, usage: Usage) -> Sequence[bytes]:
        """Usage where the client wants it, with no choices, and the end."""
        return (self._encode_event([], usage), DONE_EVENT) if self.spec.includes_usage else (DONE_EVENT,)

    def error_events(self, error: ApiError) -> Sequence[bytes]:
        """The error object in place of what would have followed, and the end."""
        return b"data: " + error.as_json() + b"\n\n", DONE_EVENT

    def _encode_event(self, choices: list[Any], usage: Usage | None) -> bytes:
        raise NotImplementedError


class EventTemplate:
    """The event of a token that has nothing but text, cut where the text goes.

    Nearly all events are of this kind, and joining four strings is ten times quicker than encoding objects.
    """

    def __init__(self, spec: GenerationSpec, sample_event: bytes) -> None:
        # The sample is made by the same encoder as all other events, with MARK as its text.
        before, after = sample_event.split(encode_json(MARK))
        assert spec.num_choices == 1 or INDEX_MARK in before
        head, _, tail = before.partition(INDEX_MARK)
        self._heads = [head + b'"index":%d' % index + tail for index in range(spec.num_choices)]
        self._after = after

    def fill(self, index: int, text: str) -> bytes:
        """The event for this choice and text."""
        return b"".join((self._heads[index], encode_json(text), self._after))


# Stands for the text in the sample; characters that no id or model name of ours contains.
MARK = "\x00text\x00"
INDEX_MARK = b'"index":0'
