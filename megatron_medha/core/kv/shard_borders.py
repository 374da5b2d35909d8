"""How cached segments hang together over the borders of KV shards, where one rank's tree ends and others' go on."""

from __future__ import annotations

from itertools import islice

from megatron_medha.core.kv.segment import KEY_BYTES, Segment

_MAX_FOLLOWERS = 8  # looked at, where many prefixes go on behind the same border


class ShardBorders:
    """The last granules of shards, and what follows them on any rank.

    The granules before a border may lie on several ranks, and what follows them on others. Where the last copy of the
    granule before a border goes, nothing that follows it can be matched.
    """

    def __init__(self, shard_granules: int) -> None:
        self._shard_granules = shard_granules
        self.copies: dict[bytes, dict[Segment, None]] = {}  # segments that end a shard, by their last key
        self._after: dict[bytes, dict[Segment, None]] = {}  # that key -> segments that begin the next shard
        self.before: dict[Segment, bytes] = {}              # and back

    def add_copy(self, segment: Segment) -> None:
        """A segment has been listed, or has grown: if it ends at a border, that granule has one copy more."""
        if segment.end % self._shard_granules == 0:
            self.copies.setdefault(bytes(segment.keys[-KEY_BYTES:]), {})[segment] = None

    def remove_copy(self, segment: Segment) -> bytes | None:
        """The end of a segment goes: the key of the granule before a border that has no copy left with that."""
        if segment.end % self._shard_granules:
            return None
        key = bytes(segment.keys[-KEY_BYTES:])
        copies = self.copies[key]
        del copies[segment]
        if copies:
            return None
        del self.copies[key]
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

    def tip(self, segment: Segment) -> Segment:
        """What is lost last of all that is lost with the end of a segment; itself, if nothing follows over a border."""
        if segment.end % self._shard_granules:
            return segment
        key = bytes(segment.keys[-KEY_BYTES:])
        followers = self._after.get(key)
        if not followers or len(self.copies[key]) > 1:
            return segment
        tips = []
        for follower in islice(reversed(followers), _MAX_FOLLOWERS):
            while follower.children:
                follower = next(reversed(follower.children))
            tips.append(self.tip(follower))
        return max(tips, key=lambda tip: (bool(tip.waiters), tip.last_use_s))

    def copies_before(self, segment: Segment) -> list[Segment]:
        """Segments that end with the granule before the shard of this one, where its shard is not the first."""
        while segment.parent is not None:
            segment = segment.parent
        before = self.before.get(segment)
        return [] if before is None else list(self.copies.get(before, ()))
