"""Encoding the next turn of a conversation: only what follows the last border token that the texts share.

What follows is encoded together with that token, so that it is not the beginning of a text, which some tokenizers write
otherwise.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_medha.text.tokenizer import Tokenizer, TooManyTokens

_CHUNK_CHARS = 256              # texts are found by hashes of so many characters after another
_MAX_KEPT_CHARS = 32 * 2**20    # 150 to 300 MB with their ids


@dataclass(frozen=True, slots=True, eq=False)
class _KeptText:
    """A text with its ids, and where they can be cut: from where on and up to where in the text, from which id on."""

    text: str
    ids: array[int]
    starts: array[int]
    ends: array[int]
    places: array[int]
    keys: Sequence[int]


class TurnEncoder:
    """Keeps the texts encoded last. Methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, max_kept_chars: int = _MAX_KEPT_CHARS) -> None:
        self._tokenizer = tokenizer
        self._borders = {border.token_id: border for border in tokenizer.border_tokens}
        self._max_kept_chars = max_kept_chars
        self._kept: dict[_KeptText, None] = {}       # the longest unused first
        self._by_key: dict[int, _KeptText] = {}      # of those that begin in one way, the latest
        self._num_kept_chars = 0
        self._lock = threading.Lock()

    def encode(
        self, text: str, *, root: bytes, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> array[int]:
        """As Tokenizer.encode. Only texts of the same root are continued. The result is not to be changed."""
        if len(text) < _CHUNK_CHARS or not self._borders:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        keys = _keys_of(root, text)
        encoded = self._continued(text, keys, max_tokens)
        with self._lock:
            self._keep(encoded)
        return self._tokenizer.with_special_tokens(encoded.ids) if add_special_tokens else encoded.ids

    def _continued(self, text: str, keys: Sequence[int], max_tokens: int | None) -> _KeptText:
        known, common = self._longest(text, keys)
        if known is not None and known.text == text and (max_tokens is None or len(known.ids) <= max_tokens):
            return known
        last = -1 if known is None else bisect_right(known.ends, common) - 1
        if known is not None and last >= 0:
            start, place = known.starts[last], known.places[last]
            if max_tokens is not None and place > max_tokens:
                raise TooManyTokens(place)
            most = None if max_tokens is None else max_tokens - place
            try:
                rest = self._tokenizer.encode(text[start:], add_special_tokens=False, max_tokens=most)
            except TooManyTokens as error:
                raise TooManyTokens(place + error.at_least) from None
            if rest and rest[0] == known.ids[place]:
                starts, ends, places = known.starts[:last], known.ends[:last], known.places[:last]
                encoded = _KeptText(text, known.ids[:place] + rest, starts, ends, places, keys)
                self._add_borders(encoded, start, place)
                return encoded
        ids = self._tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        encoded = _KeptText(text, ids, array("q"), array("q"), array("q"), keys)
        self._add_borders(encoded, 0, 0)
        return encoded

    def _longest(self, text: str, keys: Sequence[int]) -> tuple[_KeptText | None, int]:
        """Of the kept texts one that shares the longest beginning, to a chunk, and how long that is."""
        with self._lock:
            for num_chunks in range(len(keys), 0, -1):
                if (known := self._by_key.get(keys[num_chunks - 1])) is not None:
                    self._kept[known] = self._kept.pop(known)
                    break
            else:
                return None, 0
        return known, _common_chars(known.text, text)

    def _keep(self, encoded: _KeptText) -> None:
        if encoded in self._kept:
            return
        for key in encoded.keys:
            before = self._by_key.get(key)
            self._by_key[key] = encoded
            if before is not None and key == before.keys[-1]:
                self._drop(before)  # it goes on in this one
        self._kept[encoded] = None
        self._num_kept_chars += len(encoded.text)
        while self._num_kept_chars > self._max_kept_chars:
            self._drop(next(iter(self._kept)))

    def _drop(self, encoded: _KeptText) -> None:
        if encoded in self._kept:
            del self._kept[encoded]
            self._num_kept_chars -= len(encoded.text)
            for key in encoded.keys:
                if self._by_key.get(key) is encoded:
                    del self._by_key[key]

    def _add_borders(self, encoded: _KeptText, start: int, place: int) -> None:
        """Those from there on."""
        text, ids = encoded.text, encoded.ids
        new_ids = ids[place:] if place else ids
        found = []
        for token_id in self._borders.keys() & set(new_ids):
            content = self._borders[token_id].text
            in_text, in_ids, at = [], [], start
            while (at := text.find(content, at)) >= 0:
                in_text.append(at)
                at += len(content)
            at = 0
            for _ in in_text:
                try:
                    in_ids.append(at := new_ids.index(token_id, at))
                except ValueError:
                    break
                at += 1
            # The model may have made that id of other text; then nothing is known of where.
            if len(in_ids) == len(in_text) == new_ids.count(token_id):
                found += [(at, at + len(content), place + index) for at, index in zip(in_text, in_ids, strict=True)]
        for at, end, index in sorted(found):
            encoded.starts.append(at)
            encoded.ends.append(end)
            encoded.places.append(index)


def _keys_of(root: bytes, text: str) -> list[int]:
    """A hash of each beginning of whole chunks."""
    keys, key = [], hash(root)
    for start in range(0, len(text) - _CHUNK_CHARS + 1, _CHUNK_CHARS):
        key = hash((key, text[start : start + _CHUNK_CHARS]))
        keys.append(key)
    return keys


def _common_chars(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
