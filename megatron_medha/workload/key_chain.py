"""Keys of the prefix cache for texts of which no token is known, only which parts of them are equal."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from megatron_medha.core.kv.prefix_keys import KEY_BYTES


class TextSpan(NamedTuple):
    """Consecutive tokens of a text. Texts of the same name have the same tokens, others share none."""

    text: str
    first: int       # token of the text, from 0
    num_tokens: int


class KeyChain:
    """The keys of a growing text's full granules, each a hash of its granule and of the key before it.

    Equal keys mean that texts are equal up to the end of the granule, however they were put together.
    """

    __slots__ = ("_granule_tokens", "_keys", "_num_open_tokens", "_open")

    def __init__(self, granule_tokens: int) -> None:
        self._granule_tokens = granule_tokens
        self._keys = bytearray()
        self._open: list[TextSpan] = []  # of the last granule, which is not full
        self._num_open_tokens = 0

    @classmethod
    def after(cls, keys: bytes, num_tokens: int, granule_tokens: int, text: str) -> KeyChain:
        """The chain of a text of num_tokens whose full granules have these keys; `text` names what follows them."""
        chain = cls(granule_tokens)
        chain._keys += keys
        chain._num_open_tokens = num_tokens % granule_tokens
        assert len(keys) == num_tokens // granule_tokens * KEY_BYTES, "not the keys of so many tokens"
        if chain._num_open_tokens:
            chain._open.append(TextSpan(text, num_tokens - chain._num_open_tokens, chain._num_open_tokens))
        return chain

    @property
    def keys(self) -> bytes:
        """KEY_BYTES of every full granule."""
        return bytes(self._keys)

    @property
    def num_tokens(self) -> int:
        """Of the text so far."""
        return len(self._keys) // KEY_BYTES * self._granule_tokens + self._num_open_tokens

    def append(self, span: TextSpan) -> bytes:
        """Let the text grow by a span; the keys of the granules that are full now and were not before."""
        text, first, num_left = span
        num_before = len(self._keys)
        while num_left:
            count = min(num_left, self._granule_tokens - self._num_open_tokens)
            # Two spans that continue each other are one, wherever they were cut.
            if self._open and self._open[-1].text == text and sum(self._open[-1][1:]) == first:
                self._open[-1] = TextSpan(text, self._open[-1].first, self._open[-1].num_tokens + count)
            else:
                self._open.append(TextSpan(text, first, count))
            self._num_open_tokens += count
            first += count
            num_left -= count
            if self._num_open_tokens == self._granule_tokens:
                self._close_granule()
        return bytes(self._keys[num_before:])

    def extend(self, spans: Iterable[TextSpan]) -> None:
        """Let the text grow by several spans."""
        for span in spans:
            self.append(span)

    def _close_granule(self) -> None:
        granule = b"".join([b"%b\0%d\0%d\0" % (text.encode(), first, count) for text, first, count in self._open])
        self._keys += blake2b(self._keys[-KEY_BYTES:] + granule, digest_size=KEY_BYTES).digest()
        self._open.clear()
        self._num_open_tokens = 0


def cut(spans: Iterable[TextSpan], num_tokens: int) -> list[TextSpan]:
    """The first num_tokens of spans, or all of them where they have fewer."""
    found: list[TextSpan] = []
    for text, first, count in spans:
        if num_tokens <= 0:
            break
        found.append(TextSpan(text, first, min(count, num_tokens)))
        num_tokens -= count
    return found


def after_tokens(spans: Iterable[TextSpan], num_tokens: int) -> list[TextSpan]:
    """What follows the first num_tokens of spans."""
    found: list[TextSpan] = []
    for text, first, count in spans:
        skipped = min(num_tokens, count)
        num_tokens -= skipped
        if skipped < count:
            found.append(TextSpan(text, first + skipped, count - skipped))
    return found


def num_tokens_of(spans: Iterable[TextSpan]) -> int:
    """Of all of them."""
    return sum([span.num_tokens for span in spans])


def spans_of_ids(hash_ids: Iterable[int], num_tokens: int, tokens_per_id: int) -> list[TextSpan]:
    """A text of num_tokens whose blocks have these ids; the last block may be shorter."""
    return cut((TextSpan(f"#{one}", 0, tokens_per_id) for one in hash_ids), num_tokens)
