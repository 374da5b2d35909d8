"""How much of a prompt an earlier request has had, by the keys that a decision log holds."""

from __future__ import annotations

from typing import NamedTuple

from megatron_medha.core.batch import Arrived, Completed, Event
from megatron_medha.core.kv.prefix_keys import KEY_BYTES


class SharedPrefix(NamedTuple):
    """The longest prefix that a prompt shares with what came before it, in whole granules."""

    num_tokens: int
    request_id: str       # whose prompt or output had it first; "" where nothing is shared
    granule_tokens: int   # of the granule behind it: there the first different token is, or the prompt's end


class PrefixHistory:
    """The prefixes of all requests so far."""

    def __init__(self, granule_tokens: int) -> None:
        self._granule_tokens = granule_tokens
        self._first_with: dict[bytes, str] = {}  # a key in it is there with all keys before it

    def note(self, event: Event) -> None:
        """Something has happened."""
        if isinstance(event, Arrived):
            keys, request_id = event.request.prefix_keys, event.request.request_id
            for place in range(self._num_known(keys), len(keys) // KEY_BYTES):
                self._first_with[_key(keys, place)] = request_id
        elif isinstance(event, Completed):
            for request_id, keys in event.filled_keys:
                for place in range(len(keys) // KEY_BYTES):
                    self._first_with.setdefault(_key(keys, place), request_id)

    def shared(self, keys: bytes) -> SharedPrefix:
        """What a prompt with these keys shares with all noted so far."""
        count = self._num_known(keys)
        request_id = self._first_with[_key(keys, count - 1)] if count else ""
        return SharedPrefix(count * self._granule_tokens, request_id, self._granule_tokens)

    def _num_known(self, keys: bytes) -> int:
        low, high = 0, len(keys) // KEY_BYTES
        while low < high:
            middle = (low + high + 1) // 2
            if _key(keys, middle - 1) in self._first_with:
                low = middle
            else:
                high = middle - 1
        return low


def _key(keys: bytes, place: int) -> bytes:
    return keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]
