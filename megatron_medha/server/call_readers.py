"""Reading one call of a tool that arrives in pieces: as JSON, as tags, as Python."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_medha.server.call_syntax import Tags
from megatron_medha.server.call_types import typed_value
from megatron_medha.server.json_text import JsonText, dump, read_value

# The usual order of a call's fields; then arguments can be sent on as they come.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{\Z')
_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegan:
    """A call of this tool; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallWent:
    """More of the arguments of the call that began last, as JSON."""

    index: int
    arguments: str


Found = Said | CallBegan | CallWent


class Calls(Protocol):
    """Who counts calls."""

    def begin(self, name: str, found: list[Found]) -> CallBegan | None:
        """A call of this tool; None for one more than is answered."""

    def accepts(self, name: str, *, has_arguments: bool) -> bool:
        """Whether JSON with this name is a call."""

    def say(self, text: str, found: list[Found]) -> None:
        """Text."""


class CallReader:
    """What the readers have in common: one call, and the text it was in case it is none."""

    def __init__(self, calls: Calls, before: str) -> None:
        """before: what stood before it, and belongs to the text if this is no call."""
        self._calls = calls
        self._before = before
        self._call: CallBegan | None = None
        self._has_begun = False  # also one that is not answered
        self.is_done = False
        self.is_text = False     # it was no call

    def _begin(self, name: str, found: list[Found]) -> None:
        self._has_begun = True
        self._call = self._calls.begin(name, found)

    def _send(self, arguments: str, found: list[Found]) -> None:
        if self._call is not None and arguments:
            found.append(CallWent(self._call.index, arguments))

    def _be_text(self, text: str, found: list[Found]) -> None:
        self._calls.say(self._before + text, found)
        self.is_done = self.is_text = True


class JsonCall(CallReader):
    """One call as a JSON object, or only its arguments."""

    def __init__(self, calls: Calls, *, before: str = "", arguments_of: str | None = None) -> None:
        super().__init__(calls, before)
        self._json = JsonText()
        self._raw: list[str] = []     # until a call has begun
        self._has_looked = False      # at what stands before the first bracket within
        self._name = arguments_of
        self._is_in_arguments = arguments_of is not None
        self._arguments_depth = 0 if arguments_of is not None else 1

    def push(self, text: str, found: list[Found]) -> str:
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
            if not self._has_begun:
                self._raw.append(text[place:end])
            place = end
            if place < len(text) and text[place] == "<" and not scan.is_in_string:
                self._break_off(found)
                return text[place:]
            if not scan.is_in_string and text[place - 1] in "{}[]":
                self._look(found)
            if self.is_done:
                return text[place:]
        self._send_arguments(found)
        return ""

    def give_up(self, found: list[Found], *, is_cut: bool) -> None:
        """The text ends here."""
        if not is_cut and not self._json.is_in_string:
            self._break_off(found)
        elif not self._has_begun:
            self._be_text("".join(self._raw), found)

    def _look(self, found: list[Found]) -> None:
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

    def _look_at_head(self, found: list[Found]) -> None:
        head = None if self._name is not None else _HEAD.match("".join(self._raw).lstrip())
        if head is None:
            return
        name = json.loads(head.group(1), strict=False)
        if self._calls.accepts(name, has_arguments=True):
            self._json.take()
            self._name, self._is_in_arguments = name, True
            self._begin(name, found)
            self._send("{", found)

    def _send_arguments(self, found: list[Found]) -> None:
        if not self._is_in_arguments:
            return
        more = self._json.take()
        if not self._has_begun and more.strip():
            assert self._name is not None
            self._begin(self._name, found)
        if self._has_begun:
            self._send(more, found)

    def _break_off(self, found: list[Found]) -> None:
        """It ends before its brackets do."""
        if self._is_in_arguments:
            self._send_arguments(found)
            self._send(self._json.completion(self._arguments_depth), found)
        self._end("".join(self._raw) + self._json.completion(), found)

    def _end(self, text: str, found: list[Found]) -> None:
        self.is_done = True
        if self._has_begun:
            return
        # Fields in another order, or no call at all.
        call = _parse_call(text)
        if call is None or not self._calls.accepts(call[0], has_arguments=call[1] is not None):
            self._be_text("".join(self._raw), found)
            return
        self._begin(call[0], found)
        self._send(call[1] or "{}", found)


class TagCall(CallReader):
    """One call as tags around its parameters."""

    def __init__(
        self, calls: Calls, tags: Tags, closings: tuple[str, ...], schemas: Mapping[str, Any], *, before: str = ""
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

    def push(self, text: str, found: list[Found]) -> str:
        """Take a piece; what comes after the call is returned."""
        self._text += text
        while not self.is_done and self._step(found):
            pass
        return self._text if self.is_done else ""

    def give_up(self, found: list[Found], *, is_cut: bool) -> None:
        """The text ends here."""
        if not self._has_begun:
            if self._text:
                self._be_text(self._text, found)
            return
        if self._key is not None:
            end = self._text.rfind(self._tags.parameter_end)
            if end >= 0:
                self._add_value(self._text[:end], found)
                self._text = self._text[end + len(self._tags.parameter_end) :]
            else:  # cut in the middle of a value
                text = self._text.removeprefix("\n") if self._tags.pads_values else self._text
                self._send(self._member() + dump(text)[:-1], found)
                return
        if not is_cut:
            self._send("}", found)

    def _step(self, found: list[Found]) -> bool:
        """One step with what is there; false when more text is needed."""
        if not self._has_begun:
            return self._read_head(found)
        return self._read_between(found) if self._key is None else self._read_value(found)

    def _read_head(self, found: list[Found]) -> bool:
        head = self._tags.head.match(self._text)
        if head is not None:
            name = head.group(1)
            self._schema = self._schemas.get(name)
            self._begin(name, found)
            self._send("{", found)
            self._text = self._text[head.end() :]
        elif self._tags.head_so_far.fullmatch(self._text):
            return False
        else:
            # One character only: what follows may be a call.
            first, self._text = self._text[:1], self._text[1:]
            self._be_text(first, found)
        return True

    def _read_between(self, found: list[Found]) -> bool:
        tags, text = self._tags, self._text.lstrip()
        parameter = tags.parameter.match(text)
        if parameter is not None:
            self._key = parameter.group(1)
            given = parameter.groupdict().get("is_string")
            self._is_string = None if given is None else given == "true"
            self._text = text[parameter.end() :]
            self._num_searched = 0
        elif text.startswith(tags.parameter_end):
            self._text = text[len(tags.parameter_end) :]
        elif self._may_begin(text, (*self._ends, tags.parameter_end, tags.parameter_start)) or (
            tags.parameter_so_far.fullmatch(text)
        ):
            return False
        else:
            self._send("}", found)
            if tags.end not in self._ends[1:] and text.startswith(tags.end):
                self._text = text[len(tags.end) :]
            self.is_done = True
        return True

    def _read_value(self, found: list[Found]) -> bool:
        end_mark = self._tags.parameter_end
        end = self._text.find(end_mark, self._num_searched)
        if end < 0:
            self._num_searched = max(0, len(self._text) - len(end_mark))
            return False
        # The value may have the mark in it; its own end is followed by another mark.
        after = self._text[end + len(end_mark) :].lstrip()
        marks = (*self._ends, self._tags.parameter_start)
        if after.startswith(marks):
            self._add_value(self._text[:end], found)
            self._text = self._text[end + len(end_mark) :]
        elif self._may_begin(after, marks):
            return False
        else:
            self._num_searched = end + 1
        return True

    def _add_value(self, text: str, found: list[Found]) -> None:
        assert self._key is not None
        if self._tags.pads_values:
            text = text.removeprefix("\n").removesuffix("\n")
        value = text if self._is_string else typed_value(text, self._schema, self._key)
        self._send(self._member() + dump(value), found)
        self._num_parameters += 1
        self._key = None

    def _member(self) -> str:
        return (", " if self._num_parameters else "") + dump(self._key) + ": "

    @staticmethod
    def _may_begin(text: str, marks: tuple[str, ...]) -> bool:
        return any(len(text) < len(mark) and mark.startswith(text) for mark in marks)


class PythonCall(CallReader):
    """One call as Python writes it: name(key=value, ...)."""

    def __init__(self, calls: Calls, *, before: str = "") -> None:
        super().__init__(calls, before)
        self._text = ""
        self._num_read = 0
        self._depth = 0
        self._quote = ""  # of the string it is in
        self._is_escaped = False

    def push(self, text: str, found: list[Found]) -> str:
        """Take a piece; what comes after the call is returned."""
        self._text += text
        for place in range(self._num_read, len(self._text)):
            if self._ends_with(self._text[place]):
                self._end(self._text[: place + 1], found)
                return self._text[place + 1 :]
        self._num_read = len(self._text)
        return ""

    def give_up(self, found: list[Found], *, is_cut: bool) -> None:
        """The text ends here."""
        self._be_text(self._text, found)

    def _ends_with(self, char: str) -> bool:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            return self._depth == 0
        return False

    def _end(self, text: str, found: list[Found]) -> None:
        try:
            name, arguments = _parse_python(text)
            if not self._calls.accepts(name, has_arguments=False):
                raise ValueError(name)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            self._be_text(text, found)
            return
        self.is_done = True
        self._begin(name, found)
        self._send(arguments, found)


def _parse_python(text: str) -> tuple[str, str]:
    """Name and arguments of a call as JSON; ValueError where it is none."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
        raise ValueError("no call with named arguments")
    arguments = {one.arg: ast.literal_eval(_JsonNames().visit(one.value)) for one in call.keywords}
    return ast.unparse(call.func), dump(arguments)


class _JsonNames(ast.NodeTransformer):
    """JSON's names for what Python calls otherwise."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The constant, if it is one."""
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


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
            return name, arguments.strip() or "{}"
        case dict():
            return name, dump(arguments)
        case _:
            return None
