"""What /v1/responses and /v1/messages have in common: one choice, made of blocks, in events that have names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        self._blocks: list[Any] = []
        self._is_open = False  # the last block
        self._arguments = ""   # of the open call, as the model writes them
        self._events: list[bytes] = []

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """Events of one token: of what the text so far has become."""
        self._push(piece)
        return b"".join(self._take_events())

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The response that is not a stream."""
        for piece in pieces_by_choice[0]:
            self._push(piece)
        return encode_json(self._response(usage))

    def _push(self, piece: Piece) -> None:
        finder = self._finder
        for found in [TextDelta(piece.text)] if finder is None else finder.push(piece.text):
            self._add(found)
        if piece.finish_reason is not None:
            for found in () if finder is None else finder.end(piece.finish_reason, piece.stop_reason):
                self._add(found)
            self._finish(piece)
            self._close()

    def _add(self, found: ToolParserEvent) -> None:
        """Add to the open block, or begin one."""
        raise NotImplementedError

    def _finish(self, piece: Piece) -> None:
        """This is the last piece."""
        raise NotImplementedError

    def _close(self) -> None:
        """End the open block, if there is one."""
        raise NotImplementedError

    def _response(self, usage: Usage | None) -> msgspec.Struct:
        """The response so far; usage: None before the first token."""
        raise NotImplementedError

    def _emit(self, kind: str, **fields: object) -> None:
        if self.spec.is_stream:
            data = encode_json({"type": kind, **fields})
            self._events.append(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")

    def _take_events(self) -> list[bytes]:
        events, self._events = self._events, []
        return events
