"""What /v1/responses and /v1/messages have in common: one choice, made of blocks, in events that have names."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from megatron_medha.server.bodies.openai_types import Usage
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.http.routing import encode_json
from megatron_medha.server.tools.call_readers import TextDelta, ToolParserEvent
from megatron_medha.server.tools.tool_calls import ToolCallParser


class BlockFormat:
    """The part of a WireFormat that is the same in both."""

    def __init__(self, spec: GenerationSpec) -> None:
        self.spec = spec
        self._finder = None if spec.tools is None else ToolCallParser(spec.tools)
        self._arguments = ""  # of the open call, as the model writes them
        self._events: list[bytes] = []

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """Events of one token: of what the text so far has become."""
        self._push(piece)
        return b"".join(self._take_events())

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The answer that is not a stream."""
        for piece in pieces_by_choice[0]:
            self._push(piece)
        return encode_json(self._whole_answer(usage))

    def _push(self, piece: Piece) -> None:
        raise NotImplementedError

    def _whole_answer(self, usage: Usage) -> msgspec.Struct:
        raise NotImplementedError

    def _found(self, piece: Piece) -> list[ToolParserEvent]:
        if self._finder is None:
            return [TextDelta(piece.text)]
        found = self._finder.push(piece.text)
        if piece.finish_reason is not None:
            found += self._finder.end(piece.finish_reason, piece.stop_reason)
        return found

    def _put(self, kind: str, event: msgspec.Struct) -> None:
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + encode_json(event) + b"\n\n")

    def _take_events(self) -> list[bytes]:
        events, self._events = self._events, []
        return events
