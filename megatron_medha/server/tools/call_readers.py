"""Reading one call of a tool as JSON that arrives in pieces, and what its readers have in common."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass

from megatron_medha.server.tools.json_text import JsonText, as_unicode, dump, read_value
from megatron_medha.server.tools.tool_fields import ToolUse

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


def may_begin(text: str, marks: tuple[str, ...]) -> bool:
    """Whether more text may make this one of the marks."""
    return any(len(text) < len(mark) and mark.startswith(text) for mark in marks)


class ToolCallSink:
    """Collects events: calls, which it counts, and text, of which white space may have to wait."""

    def __init__(self, use: ToolUse) -> None:
        self.is_marked = False         # whether a mark stands before what is read
        self._use = use
        self._found: list[ToolParserEvent] = []
        self._num_calls = 0
        self._space = ""               # white space that waits for words
        self._holds_space = True
        self._last_char = ""
        self._is_after_call = False    # nothing but white space since

    @property
    def has_calls(self) -> bool:
        """Whether any has been found so far."""
        return self._num_calls > 0

    def accepts(self, name: str, *, has_arguments: bool) -> bool:
        """Whether JSON with this name is a call. Between marks any is: the client can see that it lacks the tool."""
        if name in self._use.names:
            return True
        is_name = bool(name) and name.isprintable()
        return is_name and self._use.guide is None and (self.is_marked or has_arguments)

    def begin(self, name: str) -> ToolCallStart | None:
        """Count a call of this tool; None for one more than is answered."""
        self._space, self._holds_space, self._last_char = "", True, ""
        if self._num_calls and not self._use.is_parallel:
            return None
        self._num_calls += 1
        began = ToolCallStart(self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)
        self._found.append(began)
        return began

    def send(self, call: ToolCallStart, arguments: str) -> None:
        """More arguments of this call."""
        self._found.append(ToolArgumentsDelta(call.index, arguments))

    def say(self, text: str) -> None:
        """Text outside calls."""
        if not text:
            return
        self._last_char = text[-1]
        if self._holds_space:
            if text.isspace():
                self._space += text
                return
            text, self._space = self._space + text, ""
            self._holds_space = self._is_after_call = False
        self._found.append(TextDelta(text))

    def _take_found(self) -> list[ToolParserEvent]:
        found, self._found = self._found, []
        return found


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

    def push(self, text: str) -> str:
        """Take a piece; what comes after the call is returned."""
        raise NotImplementedError

    def give_up(self, *, is_cut: bool) -> None:
        """No more text follows."""
        raise NotImplementedError

    def _begin(self, name: str) -> None:
        self.has_begun = True
        self._call = self._calls.begin(name)

    def _send(self, arguments: str) -> None:
        if self._call is not None and arguments:
            self._calls.send(self._call, arguments)

    def _be_text(self, text: str) -> None:
        self._calls.say(self._before + text)
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

    def push(self, text: str) -> str:
        """Take a piece; what comes after the object is returned."""
        scan, place = self._json, 0
        while place < len(text):
            if not scan.depth and text[place] != "{":
                if not text[place].isspace():
                    self._be_text("".join(self._raw))
                    return text[place:]
                self._raw.append(text[place])
                place += 1
                continue
            end = scan.push(text, place)
            if not self.has_begun:
                self._raw.append(text[place:end])
            place = end
            if (rest := self._after_other_key()) is not None:
                return rest + text[place:]
            if place < len(text) and text[place] == "<" and not scan.is_in_string:
                self._break_off()
                return text[place:]
            if not scan.is_in_string and text[place - 1] in "{}[]":
                self._look()
            if self.is_done:
                return text[place:]
        self._send_arguments()
        return ""

    def _after_other_key(self) -> str | None:
        """Without marks a JSON completion is no call if it begins with a key that calls lack: what follows that key."""
        if self._has_first_key or self._name is not None or self._calls.is_marked:
            return None
        raw = "".join(self._raw)
        first = _FIRST_KEY.match(raw)
        self._has_first_key = first is not None
        if first is None or first.group(1) in _CALL_KEYS:
            return None
        self._be_text(raw[: first.end()])
        return raw[first.end() :]

    def give_up(self, *, is_cut: bool) -> None:
        """The text ends here."""
        self._send_arguments(is_end=True)
        if not is_cut and not self._json.is_in_string:
            self._break_off()
        elif not self.has_begun:
            self._be_text("".join(self._raw))

    def _look(self) -> None:
        """What the bracket just read means."""
        depth = self._json.depth
        if depth == 2 and not self._has_looked:
            self._has_looked = True
            self._look_at_head()
        if self._is_in_arguments and depth == self._arguments_depth:
            self._send_arguments()
            self._is_in_arguments = False
        if not depth:
            self._end("".join(self._raw))

    def _look_at_head(self) -> None:
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
            self._begin(name)
            self._send("{")

    def _send_arguments(self, *, is_end: bool = False) -> None:
        if not self._is_in_arguments:
            return
        more = self._json.take(is_end=is_end)
        if not self.has_begun and more.strip():
            assert self._name is not None
            self._begin(self._name)
        if self.has_begun:
            self._send(more)

    def _break_off(self) -> None:
        """It ends before its brackets do."""
        if self._is_in_arguments:
            self._send_arguments(is_end=True)
            self._send(self._json.completion(self._arguments_depth))
        self._end("".join(self._raw) + self._json.completion())

    def _end(self, text: str) -> None:
        self.is_done = True
        if self.has_begun:
            return
        # Fields in another order, or no call at all.
        call = _parse_call(text)
        if call is None or not self._calls.accepts(call[0], has_arguments=call[1] is not None):
            self._be_text("".join(self._raw))
            return
        self._begin(call[0])
        self._send(call[1] or "{}")


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
