"""JSON as models write it: cleaned while it arrives in pieces, completed where it was cut. Not JSON of clients."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_OUTSIDE = re.compile(r'[^"{}\[\],<\s]+')
_MAX_CUTS = 4  # members given up at the end of an object that was cut
_CLOSING = {"{": "}", "[": "]"}


class JsonText:
    """A JSON value that arrives in pieces. What it gives back is JSON where the model's text nearly was.

    Control characters in strings are escaped, escapes that JSON lacks become text, commas before a closing bracket go.
    """

    def __init__(self) -> None:
        self.closers: list[str] = []  # what would close the brackets that are open
        self.is_in_string = False
        self._is_escaped = False
        self._comma = ""              # and the white space after it: kept back until something follows
        self._cleaned: list[str] = []

    @property
    def depth(self) -> int:
        """How many brackets are open."""
        return len(self.closers)

    def take(self) -> str:
        """What has been cleaned since the last call."""
        cleaned = "".join(self._cleaned)
        self._cleaned.clear()
        return cleaned

    def push(self, text: str, start: int = 0) -> int:
        """Read on up to and with the next bracket, or up to a `<` outside strings; where that ends."""
        place = start
        while place < len(text):
            if self.is_in_string:
                place = self._read_string(text, place)
                continue
            char = text[place]
            if char == "<":
                return place
            if char == ",":
                self._comma = char
            elif char.isspace() and self._comma:
                self._comma += char
            elif char in "}]":
                self._comma = ""
                self._cleaned.append(char)
                if self.closers:
                    self.closers.pop()
                return place + 1
            else:
                run = _OUTSIDE.match(text, place)
                what = run.group() if run is not None else char
                self._cleaned.append(self._comma + what)
                self._comma = ""
                if char in "{[":
                    self.closers.append(_CLOSING[char])
                    return place + 1
                self.is_in_string = char == '"'
                place += len(what) - 1
            place += 1
        return place

    def completion(self, down_to: int = 0) -> str:
        """What closes the string and the brackets that are open, but for so many of the outermost ones."""
        return ('"' if self.is_in_string else "") + "".join(reversed(self.closers[down_to:]))

    def _read_string(self, text: str, place: int) -> int:
        char = text[place]
        if self._is_escaped:
            self._is_escaped = False
            if char in '"\\/bfnrtu':
                self._cleaned.append("\\" + char)
                return place + 1
            self._cleaned.append("" if char == "'" else "\\\\")
        elif char == "\\":
            self._is_escaped = True
            return place + 1
        elif char == '"':
            self.is_in_string = False
            self._cleaned.append(char)
            return place + 1
        run = _IN_STRING.match(text, place)
        if run is None:  # a control character; or, after a lone backslash, whatever ends the string
            if char in '"\\':
                return place
            self._cleaned.append(json.dumps(char)[1:-1])
            return place + 1
        self._cleaned.append(run.group())
        return run.end()


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


def dump(value: Any) -> str:
    """JSON as models write it; with escapes only where the text would be no Unicode."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _read_strictly(text: str) -> Any:
    return json.loads(text, strict=False)


def _read_cleaned(text: str) -> Any:
    return json.loads(_scanned(text).take())


def _read_python(text: str) -> Any:
    return json.loads(json.dumps(ast.literal_eval(text)))


def _completions(text: str) -> Iterator[Any]:
    with suppress(ValueError):
        yield read_value(text)
    with suppress(ValueError):
        scan = _scanned(text)
        cleaned, end = scan.take(), scan.completion()
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
