"""JSON as models write it: cleaned while it arrives in pieces, completed where it was cut. Not JSON of clients."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_WORD = re.compile(r"[\w.+-]+")
_COMMA = re.compile(r",\s*")
_SINGLE_QUOTE = re.compile(r"'\s*")
_PLAIN = re.compile(r"[^\"'\\\x00-\x1f]+")
_HIGH, _LOW = r"\\u[dD][89abAB][0-9A-Fa-f]{2}", r"\\u[dD][c-fC-F][0-9A-Fa-f]{2}"  # halves of a surrogate pair
_ESCAPE = re.compile(rf'\\["\\/bfnrt]|{_HIGH}{_LOW}|(?!{_HIGH}|{_LOW})\\u[0-9A-Fa-f]{{4}}')
_HALF = re.compile(f"{_HIGH}|{_LOW}")
_CUT_ESCAPE = re.compile(rf"(?:{_HIGH})?(?:\\(?:u[0-9A-Fa-f]{{0,3}})?)?\Z")
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
        self._rest = ""               # a word, comma, escape or single quote whose end or successor is not there yet
        self._may_begin = True        # a string, here
        self._cleaned: list[str] = []

    @property
    def depth(self) -> int:
        """How many brackets are open."""
        return len(self.closers)

    @property
    def is_in_string(self) -> bool:
        """Whether a string is open."""
        return bool(self._quote) and not self._rest.startswith("'")

    def take(self, *, is_end: bool = False) -> str:
        """What has been cleaned since the last call. is_end: no more follows."""
        if is_end:
            rest, self._rest = self._rest, ""
            if rest.startswith("'"):
                self._quote = ""
                self._cleaned.append('"' + rest[1:])
            elif not self._quote and not rest.startswith(","):
                self._cleaned.append(_WORDS.get(rest, rest))
        cleaned = "".join(self._cleaned)
        self._cleaned.clear()
        return cleaned

    def push(self, text: str, start: int = 0) -> int:
        """Read on up to and with the next bracket, or up to a `<` outside strings; where that ends."""
        place, shift = start, 0
        if self._rest:
            place, shift = 0, start - len(self._rest)
            text, self._rest = self._rest + text[start:], ""
        while place < len(text):
            char, was_in_string = text[place], bool(self._quote)
            end = self._read_string(text, place) if was_in_string else self._read_outside(text, place)
            if end == place and (was_in_string or char != "<"):
                self._rest, end = text[place:], len(text)
            is_stop = end == place or (not was_in_string and char in "{}[]")
            place = end
            if is_stop:
                break
        return place + shift

    def completion(self, down_to: int = 0) -> str:
        """What closes the string and the brackets that are open, but for so many of the outermost ones."""
        return ('"' if self.is_in_string else "") + "".join(reversed(self.closers[down_to:]))

    def _read_outside(self, text: str, place: int) -> int:
        """Read one part of a text outside strings; where it ends. The same place: at a `<`, or more text is needed."""
        char, end = text[place], place + 1
        if (word := _WORD.match(text, place)) is not None:
            end, cleaned = word.end(), _WORDS.get(word.group(), word.group())
            if end == len(text):
                return place
        elif char == "<":
            return place
        elif char == ",":
            end = _COMMA.match(text, place).end()  # type: ignore[union-attr]
            if end == len(text):
                return place
            cleaned = "" if text[end] in ",}]<" else text[place:end]
        elif char == '"' or (char == "'" and self._may_begin):
            self._quote, cleaned = char, '"'
        else:
            cleaned = char
            if char in _CLOSING:
                self.closers.append(_CLOSING[char])
            elif char in "}]" and self.closers:
                self.closers.pop()
        self._may_begin = char in "{[:," or (self._may_begin and char.isspace())
        self._cleaned.append(cleaned)
        return end

    def _read_string(self, text: str, place: int) -> int:
        """Read one part of a string; where it ends. The same place: more text is needed."""
        char, end = text[place], place + 1
        if (plain := _PLAIN.match(text, place)) is not None:
            cleaned, end = plain.group(), plain.end()
        elif char == "\\":
            if _CUT_ESCAPE.match(text, place):
                return place
            if (escape := _ESCAPE.match(text, place)) is not None:
                cleaned, end = escape.group(), escape.end()
            elif (half := _HALF.match(text, place)) is not None:
                cleaned, end = r"\ufffd", half.end()
            elif text.startswith("\\'", place):
                cleaned, end = "'", end + 1
            else:  # a path of Windows
                cleaned = r"\\"
        elif char == self._quote == "'":
            # It ends the string if the value ends there: models do not escape apostrophes.
            after = _SINGLE_QUOTE.match(text, place).end()  # type: ignore[union-attr]
            if after == len(text):
                return place
            cleaned = char
            if text[after] in ",:]}<":
                self._quote, cleaned, end = "", '"' + text[end:after], after
        elif char == self._quote:
            self._quote, cleaned = "", char
        else:  # the other quote, or a control character
            cleaned = json.dumps(char)[1:-1]
        self._cleaned.append(cleaned)
        return end


def read_value(text: str) -> Any:
    """The value of JSON, or of what a model wrote for it; ValueError where it is neither."""
    for read in (
        lambda text: loads(text, strict=False),
        lambda text: loads(_scanned(text).take(is_end=True)),
        lambda text: loads(json.dumps(ast.literal_eval(text))),
    ):
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
