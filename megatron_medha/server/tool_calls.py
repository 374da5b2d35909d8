"""Finding calls of tools in the text of an answer that arrives in pieces."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass

from megatron_medha.server.tools import CallSyntax, ToolUse

OPENING, CLOSING = "<tool_call>", "</tool_call>"
# The usual order of a call's fields; then arguments can be sent on as they come.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BETWEEN = " \t\r\n;,"  # between calls: Llama writes semicolons, a list has commas


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
    """More of the arguments of the call that began last, as the model wrote them."""

    index: int
    arguments: str


Found = Said | CallBegan | CallWent


class CallFinder:
    """Tells calls from text. What looks like a call and is none stays text: nothing is lost."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._rest = ""             # not yet told what it is
        self._reader: _CallReader | None = None
        self._num_calls = 0
        self._is_text = False       # from here on all is text
        self._awaits_closing = False
        if use.only is not None:
            self._reader = _CallReader(self, arguments_of=use.only)

    @property
    def has_calls(self) -> bool:
        """Whether any has been found so far."""
        return self._num_calls > 0

    def push(self, text: str) -> list[Found]:
        """Take the next piece of text."""
        found: list[Found] = []
        self._rest += text
        while self._rest and self._step(found):
            pass
        return found

    def finish(self) -> list[Found]:
        """No more text follows."""
        found: list[Found] = []
        if self._reader is not None:
            found += self._reader.give_up()
            self._reader = None
        if self._rest and not (self.has_calls and (self._awaits_closing or not self._rest.strip(_BETWEEN + "[]"))):
            found.append(Said(self._rest))
        self._rest = ""
        return found

    def begin(self, name: str) -> CallBegan:
        """Count a call."""
        self._num_calls += 1
        return CallBegan(self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def knows(self, name: str) -> bool:
        """Whether that is a tool of this request."""
        return name in self._use.names

    @property
    def answers_more(self) -> bool:
        """Whether one more call would be answered."""
        return self._use.is_parallel or not self._num_calls

    def _step(self, found: list[Found]) -> bool:
        """One step with what is there; false when more text is needed."""
        if self._reader is not None:
            self._rest = self._reader.push(self._rest, found)
            if self._reader.is_done:
                is_hermes = self._use.syntax is CallSyntax.HERMES
                self._awaits_closing = is_hermes and not self._reader.is_text
                self._is_text = not is_hermes and self._reader.is_text
                self._reader = None
            return bool(self._rest)
        if self._awaits_closing:
            self._rest = self._rest.lstrip()
            if CLOSING.startswith(self._rest) and self._rest != CLOSING:
                return False
            self._rest = self._rest.removeprefix(CLOSING)
            self._awaits_closing = False
            return bool(self._rest)
        if self._is_text:
            found.append(Said(self._rest))
            self._rest = ""
            return False
        return self._open_hermes(found) if self._use.syntax is CallSyntax.HERMES else self._open_bare()

    def _open_hermes(self, found: list[Found]) -> bool:
        place = self._rest.find(OPENING)
        keep = place if place >= 0 else len(self._rest) - _overlap(self._rest, OPENING)
        said = self._rest[:keep]
        if said and (said.strip() or not self.has_calls):  # calls are a line each
            found.append(Said(said))
        if place < 0:
            self._rest = self._rest[keep:]
            return False
        self._rest = self._rest[place + len(OPENING) :]
        self._reader = _CallReader(self, before=OPENING)
        return True

    def _open_bare(self) -> bool:
        # A list's brackets are of our own making; Llama has none.
        skipped = _BETWEEN + ("[]" if self._use.syntax is CallSyntax.LIST else "")
        begin = self._rest.lstrip(skipped)
        if not begin:
            return False
        if begin.startswith("{"):
            self._reader = _CallReader(self, before=self._rest[: len(self._rest) - len(begin)])
            self._rest = begin
        else:
            self._is_text = True
        return True


class _CallReader:
    """One call as JSON, or only its arguments, arriving in pieces."""

    def __init__(self, finder: CallFinder, *, before: str = "", arguments_of: str | None = None) -> None:
        """before: what stood before it, and belongs to the text if this is no call."""
        self._finder = finder
        self._before = before
        self._text = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._name = arguments_of
        self._began: CallBegan | None = None
        self._is_silent = False               # one call too many: read, and not answered
        self._is_in_arguments = arguments_of is not None
        self._arguments_depth = 0 if arguments_of is not None else 1  # of what they stand in
        self._num_sent = 0                    # characters before here need not be sent
        self.is_done = False
        self.is_text = False                  # it was no call

    def push(self, text: str, found: list[Found]) -> str:
        """Take a piece; what comes after the object is returned."""
        for place, char in enumerate(text):
            self._text += char
            self._read(char, found)
            if self.is_done:
                return text[place + 1 :]
        self._tell(found)
        return ""

    def give_up(self) -> list[Found]:
        """The text ends here."""
        is_told = self._began is not None or self._is_silent
        text = self._before + self._text
        return [] if is_told or not text else [Said(text)]

    def _read(self, char: str, found: list[Found]) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
            return
        if not self._depth and char != "{" and not char.isspace():
            self._be_text(found)
            return
        match char:
            case '"':
                self._in_string = True
            case "{" | "[":
                if char == "{" and self._depth == 1 and self._name is None:
                    self._look_at_head()
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
                if self._is_in_arguments and self._depth == self._arguments_depth:
                    self._tell(found)
                    self._is_in_arguments = False
                if not self._depth:
                    self._end(found)
            case _:
                pass

    def _look_at_head(self) -> None:
        head = _HEAD.match(self._text.lstrip())
        if head is not None and self._finder.knows(name := json.loads(head.group(1), strict=False)):
            self._name = name
            self._is_in_arguments = True
            self._num_sent = len(self._text) - 1

    def _tell(self, found: list[Found]) -> None:
        """Send on what there is of the arguments."""
        more = self._text[self._num_sent :]
        if self._is_in_arguments and more and (self._began is not None or more.strip()):
            self._begin(found)
            if self._began is not None:
                found.append(CallWent(self._began.index, more))
            self._num_sent = len(self._text)

    def _begin(self, found: list[Found]) -> None:
        if self._began is None and not self._is_silent and self._name is not None:
            if self._finder.answers_more:
                self._began = self._finder.begin(self._name)
                found.append(self._began)
            else:
                self._is_silent = True

    def _end(self, found: list[Found]) -> None:
        self.is_done = True
        if self._began is not None or self._is_silent:
            return
        # Fields in another order, or no call at all.
        name, arguments = _parse_call(self._text)
        if arguments is None or not self._finder.knows(name):
            self._be_text(found)
            return
        self._name = name
        self._begin(found)
        if self._began is not None:
            found.append(CallWent(self._began.index, arguments))

    def _be_text(self, found: list[Found]) -> None:
        found.append(Said(self._before + self._text))
        self.is_done = self.is_text = True


def _parse_call(text: str) -> tuple[str, str | None]:
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return "", None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return "", None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, dict):
        return call["name"], json.dumps(arguments, ensure_ascii=False)
    return call["name"], arguments if isinstance(arguments, str) else None


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
