"""Reading one call of a tool as JSON that arrives in pieces, and what its readers have in common."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Protocol

from megatron_medha.server.tools.json_text import JsonText, as_unicode, dump, read_value

# The usual order of a call's fields; then arguments can be sent on as they come.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{\Z')
_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_CALL_KEYS = (*_NAMES, *_ARGUMENTS, "type", "id", "call_id", "tool_call_id", "index")
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call of this tool; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of the arguments of the call that began last, as JSON."""

    index: int
    arguments: str


ToolParserEvent = TextDelta | ToolCallStart | ToolArgumentsDelta


class ToolCallSink(Protocol):
    """Who counts calls."""

    is_marked: bool  # whether a mark stands before what is read

    def begin(self, name: str, found: list[ToolParserEvent]) -> ToolCallStart | None:
        """A call of this tool; None for one more than is answered."""

    def accepts(self, name: str, *, has_arguments: bool) -> bool:
        """Whether JSON with this name is a call."""

    def say(self, text: str, found: list[ToolParserEvent]) -> None:
        """Text."""


class ToolCallReader:
    """What the readers have in common: one call, and the text it was in case it is none."""

    def __init__(self, calls: ToolCallSink, before: str) -> None:
        """before: what stood before it, and belongs to the text if this is no call."""
        self._calls = calls
        self._before = before
        self._call: ToolCallStart | None = None
        self.has_begun = False   # also one that is not answered
        self.is_done = False
        self.is_text = False     # it was no call

    def push(self, text: str, found: list[ToolParserEvent]) -> str:
        """Take a piece; what comes after the call is returned."""
        raise NotImplementedError

    def give_up(self, found: list[ToolParserEvent], *, is_cut: bool) -> None:
        """No more text follows."""
        raise NotImplementedError

    def _begin(self, name: str, found: list[ToolParserEvent]) -> None:
        self.has_begun = True
        self._call = self._calls.begin(name, found)

    def _send(self, arguments: str, found: list[ToolParserEvent]) -> None:
        if self._call is not None and arguments:
            found.append(ToolArgumentsDelta(self._call.index, arguments))

    def _be_text(self, text: str, found: list[ToolParserEvent]) -> None:
        self._calls.say(self._before + text, found)
        self.is_done = self.is_text = True


class JsonCallReader(ToolCallReader):
    """One call as a JSON object, or only its arguments."""

    def __init__(self, calls: ToolCallSink, *, before: str = "", arguments_of: str | None = None) -> None:
        super().__init__(calls, before)
        self._json = JsonText()
        self._raw: list[str] = []     # until a call has begun
        self._has_first_key = False
        self._has_looked = False      # at what stands before the first bracket within
        self._name = arguments_of
        self._is_in_arguments = arguments_of is not None
        self._arguments_depth = 0 if arguments_of is not None else 1

    def push(self, text: str, found: list[ToolParserEvent]) -> str:
        """Take a piece; what comes after the object is returned."""
        scan, place = self._json, 0
        while place < len(text):
            if not scan.depth and text[place] != "{":
                if not text[place].isspace():
                    self._be_text("".join(self._raw), found)
                    return text[place:]
                self._raw.append(text[place])
                place += 1
                continue
            end = scan.push(text, place)
            if not self.has_begun:
                self._raw.append(text[place:end])
            place = end
            if (rest := self._after_other_key(found)) is not None:
                return rest + text[place:]
            if place < len(text) and text[place] == "<" and not scan.is_in_string:
                self._break_off(found)
                return text[place:]
            if not scan.is_in_string and text[place - 1] in "{}[]":
                self._look(found)
            if self.is_done:
                return text[place:]
        self._send_arguments(found)
        return ""

    def _after_other_key(self, found: list[ToolParserEvent]) -> str | None:
        """Without marks a JSON answer is no call if it begins with a key that calls lack: what follows that key."""
        if self._has_first_key or self._name is not None or self._calls.is_marked:
            return None
        raw = "".join(self._raw)
        first = _FIRST_KEY.match(raw)
        self._has_first_key = first is not None
        if first is None or first.group(1) in _CALL_KEYS:
            return None
        self._be_text(raw[: first.end()], found)
        return raw[first.end() :]

    def give_up(self, found: list[ToolParserEvent], *, is_cut: bool) -> None:
        """The text ends here."""
        self._send_arguments(found, is_end=True)
        if not is_cut and not self._json.is_in_string:
            self._break_off(found)
        elif not self.has_begun:
            self._be_text("".join(self._raw), found)

    def _look(self, found: list[ToolParserEvent]) -> None:
        """What the bracket just read means."""
        depth = self._json.depth
        if depth == 2 and not self._has_looked:
            self._has_looked = True
            self._look_at_head(found)
        if self._is_in_arguments and depth == self._arguments_depth:
            self._send_arguments(found)
            self._is_in_arguments = False
        if not depth:
            self._end("".join(self._raw), found)

    def _look_at_head(self, found: list[ToolParserEvent]) -> None:
        head = None if self._name is not None else _HEAD.match("".join(self._raw).lstrip())
        if head is None:
            return
        try:
            name = json.loads(head.group(1), strict=False)
        except ValueError:  # an escape that JSON lacks
            return
        if self._calls.accepts(name, has_arguments=True):
            self._json.take()
            self._name, self._is_in_arguments = name, True
            self._begin(name, found)
            self._send("{", found)

    def _send_arguments(self, found: list[ToolParserEvent], *, is_end: bool = False) -> None:
        if not self._is_in_arguments:
            return
        more = self._json.take(is_end=is_end)
        if not self.has_begun and more.strip():
            assert self._name is not None
            self._begin(self._name, found)
        if self.has_begun:
            self._send(more, found)

    def _break_off(self, found: list[ToolParserEvent]) -> None:
        """It ends before its brackets do."""
        if self._is_in_arguments:
            self._send_arguments(found, is_end=True)
            self._send(self._json.completion(self._arguments_depth), found)
        self._end("".join(self._raw) + self._json.completion(), found)

    def _end(self, text: str, found: list[ToolParserEvent]) -> None:
        self.is_done = True
        if self.has_begun:
            return
        # Fields in another order, or no call at all.
        call = _parse_call(text)
        if call is None or not self._calls.accepts(call[0], has_arguments=call[1] is not None):
            self._be_text("".join(self._raw), found)
            return
        self._begin(call[0], found)
        self._send(call[1] or "{}", found)


def _parse_call(text: str) -> tuple[str, str | None] | None:
    """Name and arguments of a call as JSON; no arguments where it has no field for them."""
    try:
        call = read_value(text)
    except ValueError:
        return None
    if not isinstance(call, dict):
        return None
    if isinstance(inner := call.get("function"), dict):
        call = inner
    name = next((call[key] for key in _NAMES if isinstance(call.get(key), str)), None)
    if name is None:
        return None
    key = next((key for key in _ARGUMENTS if key in call), None)
    arguments = call[key] if key is not None else None
    match arguments:
        case None:
            return name, None if key is None else "{}"
        case str():
            return name, _read_arguments(arguments)
        case dict():
            return name, dump(arguments)
        case []:
            return name, "{}"
        case _:
            return None


def _read_arguments(text: str) -> str:
    try:
        value = read_value(text)
    except ValueError:
        value = None
    return dump(value) if isinstance(value, dict) else as_unicode(text.strip()) or "{}"
