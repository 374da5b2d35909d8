"""Finding calls of tools in the text of a completion that arrives in pieces."""

from __future__ import annotations

import re

from megatron_medha.server.tools.call_python import PythonCallReader
from megatron_medha.server.tools.call_readers import (
    JsonCallReader,
    TextDelta,
    ToolCallReader,
    ToolCallSink,
    ToolParserEvent,
    may_begin,
)
from megatron_medha.server.tools.call_tags import TagCallReader
from megatron_medha.server.tools.tool_fields import ToolUse
from megatron_medha.text.chat.call_syntax import MARKS, REASONING

_BETWEEN = " \t\r\n;,[]"  # between calls: Llama writes semicolons, a list has brackets and commas
_PYTHON_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_SLICE_CHARS = 4096
_QUOTES = "`'\""


class ToolCallParser(ToolCallSink):
    """Separates calls from text. What looks like a call and is none stays text: nothing is lost.

    White space right after a call, or before everything, goes with the words that follow; where none follow, it goes.
    What is found does not depend on how the text is cut into pieces.
    """

    def __init__(self, use: ToolUse) -> None:
        super().__init__(use)
        self._marks = marks = MARKS[use.syntax]
        start = "" if marks.tags is None else marks.tags.start
        # Passed over in a section: an opening said twice, and what surrounds single calls.
        self._passed = tuple(mark for mark in (*marks.between, *marks.openings) if mark != start)
        self._ends = (*marks.closings, *marks.between, "" if marks.tags is None else marks.tags.end)
        self._all_marks = (*self._passed, *marks.closings, *([start] if start else ()))
        self._rest = ""                      # not yet known what it is
        self.is_last_cut = False             # of the calls
        self._reader: ToolCallReader | None = None
        self._section: str | None = None     # what was skipped of a section since its last call, or since it began
        self._section_has_calls = False
        self._owes_closing = False           # words came before the section's end
        self._reasoning_end: str | None = None
        self._may_be_bare = self._marks.is_bare
        if use.only is not None:
            self._reader = JsonCallReader(self, arguments_of=use.only)
        elif use.guide is None:
            self._reasoning_end = use.reasoning_end

    def push(self, text: str) -> list[ToolParserEvent]:
        """Take the next piece of text."""
        # By slices: what is left of a text is copied with every step.
        for begin in range(0, len(text), _SLICE_CHARS):
            self._rest += text[begin : begin + _SLICE_CHARS]
            while self._rest and self._step():
                pass
        return self._take_found()

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and the last has not been cut."""
        return self.has_calls and not self.is_last_cut

    def end(self, finish_reason: str | None, stop_reason: int | str | None) -> list[ToolParserEvent]:
        """As finish(), for a completion that has ended for these reasons."""
        # A stop string that is the end of a call cuts none.
        is_stopped = isinstance(stop_reason, str) and stop_reason.strip() not in self._ends
        return self.finish(is_cut=finish_reason == "length" or is_stopped)

    def finish(self, *, is_cut: bool = False) -> list[ToolParserEvent]:
        """No more text follows. is_cut: because there was no room for more, or it was stopped."""
        self.is_last_cut = is_cut and self._reader is not None and self._reader.has_begun
        if is_cut and self._section is not None and self.is_marked and not (self._reader and self._reader.has_begun):
            # A call was cut before it had a name.
            self._reader, self._rest, self._section_has_calls = None, "", True
        if self._reader is not None:
            self._reader.give_up(is_cut=is_cut)
            self._look_at(self._reader)
            self._reader = None
        rest, self._rest = self._rest, ""
        if self._section is not None and not self._section_has_calls:
            self.say(self._section + rest)
        elif not (self._section is not None or self._is_after_call) or not may_begin(rest.strip(), self._all_marks):
            self.say(rest)
        if self._space and not self.has_calls:
            self._found.append(TextDelta(self._space))
        return self._take_found()

    # steps: each looks at what there is, and is false when more text is needed

    def _step(self) -> bool:
        if self._reader is not None:
            return self._read(self._reader)
        if self._reasoning_end is not None:
            return self._reason(self._reasoning_end)
        if self._may_be_bare:
            return self._begin_bare()
        if self._section is not None:
            return self._look_for_call(self._section)
        return self._look_for_mark()

    def _read(self, reader: ToolCallReader) -> bool:
        self._rest = reader.push(self._rest)
        self._look_at(reader)
        if reader.is_done:
            self._reader = None
        return bool(self._rest)

    def _look_at(self, reader: ToolCallReader) -> None:
        if reader.has_begun:
            self._section, self._section_has_calls = "", True
        elif reader.is_text:
            self._section = None

    def _reason(self, end: str) -> bool:
        place = self._rest.find(end)
        keep = place + len(end) if place >= 0 else len(self._rest) - _overlap(self._rest, end)
        self.say(self._rest[:keep])
        self._rest = self._rest[keep:]
        if place >= 0:
            self._reasoning_end = None
            self._holds_space = True
            self._may_be_bare = self._marks.is_bare
        return place >= 0

    def _begin_bare(self) -> bool:
        """The text begins: with a call, or with reasoning."""
        text = self._rest.lstrip()
        if not text or any(opening.startswith(text) for opening, _ in REASONING):
            return False
        self._may_be_bare = False
        if not text.startswith(tuple(opening for opening, _ in REASONING)):
            self._enter_section("")
        return True

    def _look_for_mark(self) -> bool:
        marks = self._marks
        closings = marks.closings if self._is_after_call or self._owes_closing else ()
        sought = (*marks.openings, *closings, *(opening for opening, _ in REASONING))
        place, mark = min(
            ((place, mark) for mark in sought if (place := self._rest.find(mark)) >= 0), default=(-1, ""),
        )  # fmt: skip
        if place < 0:
            keep = len(self._rest) - max(_overlap(self._rest, mark) for mark in sought)
            self.say(self._rest[:keep])
            self._rest = self._rest[keep:]
            return False
        before, self._rest = self._rest[:place], self._rest[place + len(mark) :]
        self.say(before)
        if mark in closings and (self._is_after_call or self._owes_closing):
            self._owes_closing = False
        elif mark in marks.openings:
            is_tag = marks.tags is not None and mark == marks.tags.start
            self._rest = mark + self._rest if is_tag else self._rest
            self._enter_section("" if is_tag else mark)
        else:
            is_quoted = self._last_char != "" and self._last_char in _QUOTES
            self.say(mark)
            if not is_quoted and mark not in closings:
                self._reasoning_end = dict(REASONING)[mark]
        return True

    def _enter_section(self, opening: str) -> None:
        self._section, self.is_marked = opening, not self._marks.is_bare or bool(opening)
        self._section_has_calls = False

    def _look_for_call(self, section: str) -> bool:
        marks, begin = self._marks, self._num_skipped()
        skipped, text = self._rest[:begin], self._rest[begin:]
        passed = next((mark for mark in self._passed if text.startswith(mark)), None)
        closing = next((mark for mark in marks.closings if text.startswith(mark)), None)
        if not text or may_begin(text, self._all_marks):
            self._section, self._rest = section + skipped, text
            return False
        if passed is not None:
            self._section = section + skipped + ("" if self._section_has_calls else passed)
            self._rest = text[len(passed) :]
        elif closing is not None and self._section_has_calls:
            self._rest = text[len(closing) :]
            self._section, self._is_after_call, self._owes_closing = None, True, False
        else:
            return self._begin_call(section + skipped, text)
        return True

    def _begin_call(self, skipped: str, text: str) -> bool:
        """A call begins, or something that may become one: then false. If neither, the section has ended with words."""
        marks, tags = self._marks, self._marks.tags
        self._section, self._rest = skipped, text
        before = _words_among(skipped) if self._section_has_calls else skipped
        name = _PYTHON_NAME.match(text) if marks.is_python else None
        if text.startswith("{"):
            self._reader = JsonCallReader(self, before=before)
        elif tags is not None and (tags.start and text.startswith(tags.start) or tags.head_so_far.match(text)):
            self._reader = TagCallReader(self, tags, marks.closings, self._use.schemas, before=before)
        elif marks.head is not None and (head := marks.head.match(text)):
            self._rest = text[head.end() :]
            self._reader = JsonCallReader(self, before=before + head.group(), arguments_of=head.group(1))
        elif name is not None and text[name.end() :].startswith("("):
            self._reader = PythonCallReader(self, before=before)
        elif name is not None and name.end() == len(text) or (
            marks.head_so_far is not None and marks.head_so_far.fullmatch(text)
        ):
            return False
        else:
            self._owes_closing = self._section_has_calls and bool(marks.closings)
            self._section = None
            self.say(before)
        return True

    def _num_skipped(self) -> int:
        """How many characters at the beginning of the rest may stand between calls."""
        between = _BETWEEN + ("}" if self._section_has_calls else "")
        num_skipped = len(self._rest) - len(self._rest.lstrip(between))
        last = num_skipped - 1
        is_mark = last >= 0 and (
            self._rest.startswith(self._all_marks, last) or may_begin(self._rest[last:], self._all_marks)
        )
        return last if is_mark else num_skipped  # a bracket may begin a mark


def _words_among(skipped: str) -> str:
    """Of what stands after a call and before words, that which belongs to the words."""
    between, bracket, words = skipped.partition("[")
    return "".join(char for char in between if char.isspace()) + bracket + words


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
