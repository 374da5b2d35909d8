"""JSON as models write it: cleaned while it arrives in pieces, completed where it was cut. Not JSON of clients."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_IN_STRING = re.compile(r"[^\"'\\\x00-\x1f]+")
_WORD = re.compile(r"[\w.+-]+")
_HEX = re.compile("[0-9A-Fa-f]")
_ESCAPE_CHARS = len(r"\u0041")
_REPLACEMENT = r"\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
# What Python and JavaScript call values, of which some are none in JSON.
_WORDS = {
    "True": "true", "False": "false", "None": "null", "undefined": "null", "NaN": "null", "Infinity": "null",
    "-Infinity": "null",
}  # fmt: skip
_MAX_CUTS = 4  # members given up at the end of an object that was cut
_CLOSING = {"{": "}", "[": "]"}


class JsonText:
    """A JSON value that arrives in pieces. What it gives back is JSON where the model's text nearly was.

    Strings in single quotes and Python's constants become JSON's. Control characters in strings are escaped, escapes
    that JSON lacks become text, commas before a closing bracket go.
    """

    def __init__(self) -> None:
        self.closers: list[str] = []  # what would close the brackets that are open
        self._quote = ""              # of the string it is in
        self._quote_end = ""          # a single quote that may end it, and the white space after that
        self._escape = ""             # a backslash, or more of an escape
        self._first_half = ""         # of a surrogate pair, as an escape
        self._word = ""               # outside strings, kept back until it ends
        self._comma = ""              # and the white space after it: kept back until something follows
        self._may_begin = True        # a string, here
        self._cleaned: list[str] = []

    @property
    def depth(self) -> int:
        """How many brackets are open."""
        return len(self.closers)

    @property
    def is_in_string(self) -> bool:
        """Whether a string is open."""
        return bool(self._quote) and not self._quote_end

    def take(self, *, is_end: bool = False) -> str:
        """What has been cleaned since the last call. is_end: no more follows."""
        if is_end:
            self._end_word()
            self._end_string()
        cleaned = "".join(self._cleaned)
        self._cleaned.clear()
        return cleaned

    def push(self, text: str, start: int = 0) -> int:
        """Read on up to and with the next bracket, or up to a `<` outside strings; where that ends."""
        place = start
        while place < len(text):
            if self._quote:
                place = self._read_string(text, place)
                continue
            if (word := _WORD.match(text, place)) is not None:
                self._add("")
                self._word += word.group()
                place = word.end()
                continue
            self._end_word()
            char = text[place]
            if char == "<":
                return place
            if char == ",":
                self._comma, self._may_begin = char, True
            elif char.isspace() and self._comma:
                self._comma += char
            elif char in "}]":
                self._comma, self._may_begin = "", False
                self._add(char)
                if self.closers:
                    self.closers.pop()
                return place + 1
            elif char in "{[":
                self._may_begin = True
                self._add(char)
                self.closers.append(_CLOSING[char])
                return place + 1
            elif char == '"' or (char == "'" and self._may_begin):
                self._quote, self._may_begin = char, False
                self._add('"')
            else:
                self._may_begin = char == ":" or (self._may_begin and char.isspace())
                self._add(char)
            place += 1
        return place

    def completion(self, down_to: int = 0) -> str:
        """What closes the string and the brackets that are open, but for so many of the outermost ones."""
        return ('"' if self.is_in_string else "") + "".join(reversed(self.closers[down_to:]))

    def _add(self, text: str) -> None:
        self._cleaned.append(self._comma + text)
        self._comma = ""

    def _end_word(self) -> None:
        if self._word:
            self._cleaned.append(_WORDS.get(self._word, self._word))
            self._word, self._may_begin = "", False

    def _end_string(self) -> None:
        """If there was a quote that may end it."""
        if self._quote_end:
            self._say('"' + self._quote_end[1:])
            self._quote = self._quote_end = ""

    def _read_string(self, text: str, place: int) -> int:
        char = text[place]
        if self._quote_end:
            # It ends the string if the value ends there: models do not escape apostrophes.
            if char.isspace():
                self._quote_end += char
                return place + 1
            if char in ",:]}<":
                self._end_string()
                return place
            self._say("'" + json.dumps(self._quote_end[1:])[1:-1])
            self._quote_end = ""
        if self._escape:
            return self._read_escape(char, place)
        if char == "\\":
            self._escape = char
        elif char == self._quote == "'":
            self._quote_end = char
        elif char == self._quote:
            self._quote = ""
            self._say(char)
        elif (run := _IN_STRING.match(text, place)) is not None:
            self._say(run.group())
            return run.end()
        else:  # the other quote, or a control character
            self._say(json.dumps(char)[1:-1])
        return place + 1

    def _read_escape(self, char: str, place: int) -> int:
        if len(self._escape) > 1 and _HEX.fullmatch(char) or self._escape + char == "\\u":
            self._escape += char
            if len(self._escape) == _ESCAPE_CHARS:
                self._end_code()
            return place + 1
        escape, self._escape = self._escape, ""
        if len(escape) > 1:  # a path of Windows
            self._say("\\" + escape)
            return place
        if char in '"\\/bfnrt':
            self._say("\\" + char)
            return place + 1
        if char == "'":
            self._say(char)
            return place + 1
        self._say("\\\\")
        return place

    def _end_code(self) -> None:
        """An escape of a code is complete. Halves of surrogate pairs, which are no text, are replaced."""
        escape, self._escape = self._escape, ""
        code = int(escape[2:], 16)
        if 0xD800 <= code < 0xDC00:
            self._say("")
            self._first_half = escape
        elif 0xDC00 <= code < 0xE000 and self._first_half:
            self._cleaned.append(self._first_half + escape)
            self._first_half = ""
        else:
            self._say(_REPLACEMENT if 0xDC00 <= code < 0xE000 else escape)

    def _say(self, text: str) -> None:
        if self._first_half:
            self._cleaned.append(_REPLACEMENT)
            self._first_half = ""
        self._cleaned.append(text)


def read_value(text: str) -> Any:
    """The value of JSON, or of what a model wrote for it; ValueError where it is neither."""
    for read in (_read_strictly, _read_cleaned, _read_python):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    raise ValueError("no JSON")


def read_cut_object(text: str) -> dict[str, Any]:
    """The object that this is or was going to be, without a member that was cut; an empty one where it is none."""
    for _ in range(_MAX_CUTS):
        for value in _completions(text):
            return value if isinstance(value, dict) else {}
        text = text[: max(0, text.rfind(","))]
    return {}


def loads(text: str, *, strict: bool = True) -> Any:
    """As json.loads(); ValueError for numbers that JSON cannot have."""
    return json.loads(text, strict=strict, parse_constant=_refuse, parse_float=_finite)


def dump(value: Any) -> str:
    """JSON as models write it, halves of surrogate pairs replaced. ValueError as in loads()."""
    return as_unicode(json.dumps(value, ensure_ascii=False, allow_nan=False))


def as_unicode(text: str) -> str:
    """The text with halves of surrogate pairs replaced, which Python's strings may have and UTF-8 may not."""
    return _SURROGATE.sub("\ufffd", text)


def _read_strictly(text: str) -> Any:
    return loads(text, strict=False)


def _read_cleaned(text: str) -> Any:
    return loads(_scanned(text).take(is_end=True))


def _read_python(text: str) -> Any:
    return loads(json.dumps(ast.literal_eval(text)))


def _completions(text: str) -> Iterator[Any]:
    with suppress(ValueError):
        yield read_value(text)
    with suppress(ValueError):
        scan = _scanned(text)
        cleaned, end = scan.take(is_end=True), scan.completion()
        for between in ("", "null"):
            with suppress(ValueError):
                yield read_value(cleaned + between + end)


def _scanned(text: str) -> JsonText:
    scan, place = JsonText(), 0
    while place < len(text):
        end = scan.push(text, place)
        if end == place:  # a `<` outside strings
            raise ValueError("no JSON")
        place = end
    return scan


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")
