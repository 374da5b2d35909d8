"""One pass over a JSON body before any of it is built: counts its values, and cuts out long texts and lists of ids.

A decoder makes all objects of a body in one call and holds the interpreter's lock meanwhile, so what a body holds has
to be known before. The pass goes by small slices, and others run between them. It does not check the JSON: what it
leaves and what it cuts out is decoded afterwards, and the decoder refuses what is wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from megatron_medha.server.http.http_errors import ApiError, bad_request

SLICE_BYTES = 64 * 2**10        # of a text or a list of ids: some 0.2 ms
DENSE_SLICE_BYTES = 8 * 2**10   # of everything else, where each byte may be a token of its own: some 3 ms at most

SLICE_CUTS = 256                # 2 ms
MAX_DEPTH = 1_024               # the decoder goes less deep

_VALUES_OF_A_LIST_OF_IDS = 4    # as cutting one out takes more time and memory than building a value

_OPEN_OBJECT, _OPEN_LIST, _CLOSE_OBJECT, _CLOSE_LIST, _COMMA = b"{[}],"
_MARK, _TEXT, _UNFINISHED_TEXT, _SCALAR = 1, 2, 3, 4
_TOKEN = re.compile(rb'([\[\]{},:])|("(?:[^"\\]++|\\.)*+")|(")|([^\s\[\]{},:"]++)', re.DOTALL)
_IDS = re.compile(rb"[0-9\-,\s]*+")

Path: TypeAlias = "tuple[str | int, ...]"


def invalid_json(why: object) -> ApiError:
    """A 400 for what is no JSON."""
    return bad_request(f"the body is not valid JSON: {why}", code="invalid_json")


def too_much(field: str | None, why: str, code: str, status: int = 400) -> ApiError:
    """The body holds more than it may, most of all this field."""
    return ApiError(status, why if field is None else f"{field[:80]}: {why}", param=field, code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRules:
    """Which top-level fields hold the prompt, and how much all else may be."""

    texts: frozenset[str] = frozenset()  # any text inside these may be long
    ids: frozenset[str] = frozenset()    # these are a list of ids, or a list of such lists
    max_values: int                      # objects, lists, texts, keys, numbers; a whole list of ids counts as four
    max_bytes: int                       # of what is not cut out
    min_cut_bytes: int                   # texts shorter than that are left where they are


@dataclass(frozen=True, slots=True)
class Cut:
    """A text (with its quotes) or list of ids that was cut out; `mark` stands in its place."""

    path: Path
    begin: int
    end: int
    mark: str | list[int]


@dataclass(slots=True)
class Scanned:
    """What is left of a body, and what was cut out of it."""

    rest: bytes
    cuts: list[Cut] = field(default_factory=list)


class BodyScan:
    """The state of a pass: where it is, in which containers, and what it has counted."""

    def __init__(self, body: bytearray | bytes, rules: ScanRules) -> None:
        self._body = body
        self._rules = rules
        self._are_objects: list[bool] = []                 # of the containers that are open
        self._places: list[re.Match[bytes] | int | None] = []  # the key or index that each of them is at
        self._is_key = False                               # whether the next text is a key
        self._field: str | None = None                     # the top-level key whose value is being read
        self._num_values = 0
        self._num_gaps = 0     # commas and colons
        self._values_before: dict[str | None, int] = defaultdict(int)  # by field, of those that are complete
        self._bytes_before: dict[str | None, int] = defaultdict(int)
        self._num_values_at_field = self._num_bytes_at_field = 0
        self._rest: list[bytes] = []
        self._num_rest_bytes = 0
        self._rest_from = 0    # the first byte that is neither in the rest nor cut out
        self._cuts: list[Cut] = []

    def run(self) -> Generator[None, None, Scanned]:
        """Yields after each slice; ApiError 4xx as soon as there is too much, or no JSON."""
        body, size = self._body, len(self._body)
        position = slice_end = num_cuts = 0
        while position < size:
            if position >= slice_end or len(self._cuts) >= num_cuts + SLICE_CUTS:
                yield
                slice_end, num_cuts = min(position + DENSE_SLICE_BYTES, size), len(self._cuts)
            position = yield from self._read_tokens(position, slice_end)
            self._check_bytes(position)
        if self._are_objects:
            raise invalid_json("it ends too early")
        self._rest.append(bytes(body[self._rest_from :]))
        return Scanned(b"".join(self._rest), self._cuts)

    def _read_tokens(self, position: int, end: int) -> Generator[None, None, int]:
        """Read the tokens between two positions, and what goes on beyond the second; where the next one may begin."""
        for token in _TOKEN.finditer(self._body, position, end):
            kind = token.lastindex
            if kind == _MARK:
                mark = self._body[token.start()]
                if mark == _OPEN_LIST and self._may_be_ids():
                    list_end = yield from self._end_of_ids(token.start())
                    if list_end:
                        self._num_values += _VALUES_OF_A_LIST_OF_IDS - 1
                        self._count_value()
                        self._cut(token.start(), list_end, [-len(self._cuts) - 1])
                        return list_end
                self._read_mark(mark)
            elif kind == _UNFINISHED_TEXT:
                text_end = yield from self._end_of_text(token.start())
                self._count_value()
                self._end_text(None, token.start(), text_end)
                return text_end
            else:
                self._count_value()
                if kind == _TEXT:
                    self._end_text(token, token.start(), token.end())
        return end

    def _end_text(self, key: re.Match[bytes] | None, begin: int, end: int) -> None:
        if self._is_key:
            self._begin_field(key)
        elif self._field in self._rules.texts and end - begin >= self._rules.min_cut_bytes:
            self._cut(begin, end, f"\0{len(self._cuts)}")

    def _read_mark(self, mark: int) -> None:
        if mark in (_OPEN_OBJECT, _OPEN_LIST):
            is_object = mark == _OPEN_OBJECT
            self._count_value()
            if len(self._are_objects) == MAX_DEPTH:
                raise invalid_json("nested too deeply")
            self._are_objects.append(is_object)
            self._places.append(None if is_object else 0)
            self._is_key = is_object
            return
        if mark in (_CLOSE_OBJECT, _CLOSE_LIST):
            if not self._are_objects or self._are_objects.pop() != (mark == _CLOSE_OBJECT):
                raise invalid_json("brackets that do not match")
            self._places.pop()
            self._is_key = False
            return
        self._num_gaps += 1
        if not self._are_objects or self._num_gaps > 2 * self._rules.max_values:
            raise invalid_json("commas and colons without values")
        if mark == _COMMA:
            self._is_key = self._are_objects[-1]
            if not self._is_key:
                self._places[-1] += 1  # type: ignore[operator]  # a list's place is an index

    def _begin_field(self, key: re.Match[bytes] | None) -> None:
        """A key was read: its value comes next. None: a key so long that nothing has that name."""
        self._is_key = False
        self._places[-1] = key
        if len(self._places) == 1:
            self._end_field(self._rest_from if key is None else key.start())
            self._field = None if key is None else _name(key)

    def _end_field(self, position: int) -> None:
        num_bytes = self._num_rest_bytes + position - self._rest_from
        self._values_before[self._field] += self._num_values - self._num_values_at_field
        self._bytes_before[self._field] += num_bytes - self._num_bytes_at_field
        self._num_values_at_field, self._num_bytes_at_field = self._num_values, num_bytes

    def _may_be_ids(self) -> bool:
        """Whether a list that begins here can be one of token ids."""
        return self._field in self._rules.ids and self._are_objects in ([True], [True, False])

    def _end_of_ids(self, begin: int) -> Generator[None, None, int]:
        """Where a list of nothing but whole numbers ends; 0 if it is none, or is empty."""
        end = slice_end = begin + 1
        while end == slice_end:
            if end > begin + 1:
                yield
            slice_end = end + SLICE_BYTES
            match = _IDS.match(self._body, end, slice_end)
            assert match is not None, "it matches nothing too"
            end = match.end()
        return end + 1 if end > begin + 1 and self._body[end : end + 1] == b"]" else 0

    def _end_of_text(self, begin: int) -> Generator[None, None, int]:
        """Where a text ends that may be long, after its closing quote."""
        body, size = self._body, len(self._body)
        position = begin + 1
        may_be_long = self._field in self._rules.texts and not self._is_key
        while True:
            part = body[position : position + SLICE_BYTES]
            if b"\\" in part:  # what is escaped is no end; the slices begin outside of escapes, so pairs are pairs
                part = part.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            quote = part.find(b'"')
            if quote >= 0:
                return position + quote + 1
            if position + len(part) >= size:
                raise invalid_json("a text that does not end")
            position += len(part) - part.endswith(b"\\")
            if not may_be_long:
                self._check_bytes(position)
            yield

    def _cut(self, begin: int, end: int, mark: str | list[int]) -> None:
        path = tuple(_name(place) if isinstance(place, re.Match) else place for place in self._places)
        if None in path:
            return
        encoded = msgspec.json.encode(mark)
        self._rest += (bytes(self._body[self._rest_from : begin]), encoded)
        self._num_rest_bytes += begin - self._rest_from + len(encoded)
        self._rest_from = end
        self._cuts.append(Cut(path, begin, end, mark))  # type: ignore[arg-type]  # no None in it

    def _count_value(self) -> None:
        self._num_values += 1
        if self._num_values > self._rules.max_values:
            self._end_field(self._rest_from)
            worst = max(self._values_before, key=self._values_before.__getitem__)
            what = f"more than {self._rules.max_values} JSON values (objects, lists, texts, numbers) in one body"
            raise too_much(worst, what, "too_many_values")

    def _check_bytes(self, position: int) -> None:
        if self._num_rest_bytes + position - self._rest_from > self._rules.max_bytes:
            self._end_field(position)
            worst = max(self._bytes_before, key=self._bytes_before.__getitem__)
            what = f"all of a body but the prompt's own text or ids may have {self._rules.max_bytes} bytes"
            raise too_much(worst, what, "body_too_large", 413)


def _name(key: re.Match[bytes]) -> str | None:
    raw = key.group()
    if b"\\" not in raw:
        return raw[1:-1].decode(errors="replace")
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
