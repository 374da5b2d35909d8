"""Reading one call of a tool as tags around its parameters, which arrives in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_medha.server.tools.call_readers import ToolCallReader, ToolCallSink, may_begin
from megatron_medha.server.tools.call_types import typed_value
from megatron_medha.server.tools.json_text import dump
from megatron_medha.text.chat.call_syntax import Tags

_QUOTES = "\"'"  # around names, where the syntax has none


class TagCallReader(ToolCallReader):
    """One call as tags around its parameters."""

    def __init__(
        self,
        calls: ToolCallSink,
        tags: Tags,
        closings: tuple[str, ...],
        schemas: Mapping[str, Any],
        *,
        before: str = "",
    ) -> None:
        """closings: of the section it stands in. schemas: of the arguments of each tool."""
        super().__init__(calls, before)
        self._tags = tags
        self._ends = (tags.end, *closings)
        self._schemas = schemas
        self._schema: Any = None
        self._text = ""
        self._key: str | None = None         # of the parameter whose value is being read
        self._is_string: bool | None = None  # as the tag says
        self._num_searched = 0
        self._num_parameters = 0

    def push(self, text: str) -> str:
        """Take a piece; what comes after the call is returned."""
        self._text += text
        while not self.is_done and self._step():
            pass
        return self._text if self.is_done else ""

    def give_up(self, *, is_cut: bool) -> None:
        """The text ends here."""
        if not self.has_begun:
            if self._text:
                self._be_text(self._text)
            return
        if self._key is not None:
            end = self._text.rfind(self._tags.parameter_end)
            if end >= 0:
                self._add_value(self._text[:end])
                self._text = self._text[end + len(self._tags.parameter_end) :]
            else:  # cut in the middle of a value
                text = self._text.removeprefix("\n") if self._tags.pads_values else self._text
                self._send(self._member() + dump(text)[:-1])
                return
        if not is_cut:
            self._send("}")

    def _step(self) -> bool:
        """One step with what is there; false when more text is needed."""
        if not self.has_begun:
            return self._read_head()
        return self._read_between() if self._key is None else self._read_value()

    def _read_head(self) -> bool:
        head = self._tags.head.match(self._text)
        if head is not None:
            name = head.group(1).strip(_QUOTES)
            self._schema = self._schemas.get(name)
            self._begin(name)
            self._send("{")
            self._text = self._text[head.end() :]
        elif self._tags.head_so_far.fullmatch(self._text):
            return False
        else:
            # One character only: what follows may be a call.
            first, self._text = self._text[:1], self._text[1:]
            self._be_text(first)
        return True

    def _read_between(self) -> bool:
        tags, text = self._tags, self._text.lstrip()
        parameter = tags.parameter.match(text)
        if parameter is not None:
            self._key = parameter.group(1).strip(_QUOTES)
            given = parameter.groupdict().get("is_string")
            self._is_string = None if given is None else given == "true"
            self._text = text[parameter.end() :]
            self._num_searched = 0
        elif text.startswith(tags.parameter_end):
            self._text = text[len(tags.parameter_end) :]
        elif may_begin(text, (*self._ends, tags.parameter_end, tags.parameter_start)) or (
            tags.parameter_so_far.fullmatch(text)
        ):
            return False
        else:
            self._send("}")
            if tags.end not in self._ends[1:] and text.startswith(tags.end):
                self._text = text[len(tags.end) :]
            self.is_done = True
        return True

    def _read_value(self) -> bool:
        end_mark = self._tags.parameter_end
        end = self._text.find(end_mark, self._num_searched)
        if end < 0:
            self._num_searched = max(0, len(self._text) - len(end_mark))
            return False
        # The value may have the mark in it; its own end is followed by another mark.
        after = self._text[end + len(end_mark) :].lstrip()
        marks = (*self._ends, self._tags.parameter_start)
        if after.startswith(marks):
            self._add_value(self._text[:end])
            self._text = self._text[end + len(end_mark) :]
        elif may_begin(after, marks):
            return False
        else:
            self._num_searched = end + 1
        return True

    def _add_value(self, text: str) -> None:
        assert self._key is not None
        if self._tags.pads_values:
            text = text.removeprefix("\n").removesuffix("\n")
        value = text if self._is_string else typed_value(text, self._schema, self._key)
        self._send(self._member() + dump(value))
        self._num_parameters += 1
        self._key = None

    def _member(self) -> str:
        return (", " if self._num_parameters else "") + dump(self._key) + ": "
