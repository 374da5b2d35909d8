"""Keys of prompts in a decision log: of each, only what follows the longest prefix that the log has already.

Keys are chained, so that the last key of a prefix stands for all of it.
"""

from __future__ import annotations

from base64 import b64decode, b64encode

from megatron_medha.core.kv.prefix_keys import KEY_BYTES

_MAX_KNOWN = 500_000  # keys, in 60 MB; then all are forgotten, and written once more


class KeyWriter:
    """What to write for the keys of one request after another."""

    def __init__(self, max_known: int = _MAX_KNOWN) -> None:
        self._max_known = max_known
        self._known: set[bytes] = set()  # a key in it is there with all keys before it

    def write(self, keys: bytes) -> list[str]:
        """The last known key, or nothing, and those after it."""
        low, high = 0, len(keys) // KEY_BYTES
        while low < high:
            middle = (low + high + 1) // 2
            if _key(keys, middle - 1) in self._known:
                low = middle
            else:
                high = middle - 1
        rest = len(keys) // KEY_BYTES - low
        if len(self._known) + rest > self._max_known:
            self._known.clear()
        else:
            self._known.update(_key(keys, place) for place in range(low, low + rest))
        last_known = _key(keys, low - 1) if low else b""
        return [b64encode(last_known).decode(), b64encode(keys[low * KEY_BYTES :]).decode()]


class KeyReader:
    """The keys again."""

    def __init__(self) -> None:
        self._before: dict[bytes, bytes] = {}  # the key before each

    def read(self, written: list[str]) -> bytes:
        """What write() was given. Raises ValueError for what it has not written."""
        last_known, rest = map(b64decode, written)
        if len(last_known) not in (0, KEY_BYTES) or len(rest) % KEY_BYTES:
            raise ValueError("keys of another length")
        known, key = [], last_known
        while key:
            known.append(key)
            if (before := self._before.get(key)) is None:
                raise ValueError("a prefix that is not in the log")
            key = before
        before = last_known
        for place in range(len(rest) // KEY_BYTES):
            key = _key(rest, place)
            self._before[key] = before
            before = key
        return b"".join(reversed(known)) + rest


def _key(keys: bytes, place: int) -> bytes:
    return keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]
