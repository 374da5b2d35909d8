"""How cached segments hang together over the borders of KV shards, where one rank's tree ends and others' go on."""

from __future__ import annotations

from megatron_medha.core.kv.segment import KEY_BYTES, Segment


class ShardBorders:
    """The last granules of shards, and what follows them on any rank.

    The granules before a border may lie on several ranks, and what follows them on others. Where the last copy of the
    granule before a border goes, nothing that follows it can be matched.
    """

    def __init__(self, shard_granules: int) -> None:
        self._shard_granules = shard_granules
        self.num_copies: dict[bytes, int] = {}             # of the last granule of a shard, by its key
        self._after: dict[bytes, dict[Segment, None]] = {}  # that key -> segments that begin the next shard
        self.before: dict[Segment, bytes] = {}             # and back

    def add_copy(self, segment: Segment) -> None:
        """A segment has been listed, or has grown: if it ends at a border, that granule has one copy more."""
        if segment.end % self._shard_granules == 0:
            key = bytes(segment.keys[-KEY_BYTES:])
            self.num_copies[key] = self.num_copies.get(key, 0) + 1

    def remove_copy(self, segment: Segment) -> bytes | None:
        """The end of a segment goes: the key of the granule before a border that has no copy left with that."""
        if segment.end % self._shard_granules:
            return None
        key = bytes(segment.keys[-KEY_BYTES:])
        self.num_copies[key] -= 1
        if self.num_copies[key]:
            return None
        del self.num_copies[key]
        return key

    def begin(self, segment: Segment, keys: bytes) -> None:
        """A segment has been listed: if it begins a shard, it follows the granule before in `keys`."""
        if segment.parent is None and segment.first:
            before = bytes(keys[(segment.first - 1) * KEY_BYTES : segment.first * KEY_BYTES])
            self._after.setdefault(before, {})[segment] = None
            self.before[segment] = before

    def replace(self, old: Segment, new: Segment) -> None:
        """The begin of a segment is another object now."""
        if (before := self.before.pop(old, None)) is not None:
            del self._after[before][old]
            self._after[before][new] = None
            self.before[new] = before

    def end(self, segment: Segment) -> None:
        """The begin of a segment is listed no more."""
        if (before := self.before.pop(segment, None)) is not None:
            del self._after[before][segment]
            if not self._after[before]:
                del self._after[before]

    def after(self, border: bytes) -> list[Segment]:
        """Segments that begin the shard after the granule of that key, on any rank."""
        return list(self._after.get(border, ()))
