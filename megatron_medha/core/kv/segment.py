"""A run of cached granules, and what a sequence holds of them on one of its shards. No clock, no token, no decision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_medha.core.kv.block_pool import Extent

KEY_BYTES = 16


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive computed granules of one prefix on one KVP rank: a node of the radix tree.

    Keys are chained, so a granule's key stands for the whole prefix up to its end. A segment lies in one shard.
    Where it has pins it is in use and is never evicted.
    """

    kvp_rank: int
    group: int
    parent: Segment | None       # holds the granules before `first`; None where the shard begins
    first: int                   # number of its first granule, counted from the start of the sequence
    keys: bytearray              # KEY_BYTES a granule
    extents: list[Extent]        # of all its granules, in order
    creator: str                 # the request that computed it
    session: str = ""            # the only one that has used it; "": none, or several
    num_references: int = 0      # sequences whose deepest segment on this shard it is
    pins: int = 0                # references and pinned children
    children: dict[Segment, None] = field(default_factory=dict)  # in order of creation
    waiters: dict[str, float] = field(default_factory=dict)      # requests that count on it, and when they are due
    last_use_s: float = 0.0      # when it last had a pin
    is_ended: bool = False       # its session has ended
    is_matched: bool = False     # a request has begun with it since its last use
    is_proven: bool = False      # somebody has sampled a token behind it: what it holds are numbers
    is_listed: bool = True       # False: of a sequence that failed; no match finds it, and it goes with its last pin
    ticket: int = 0              # its place in the eviction order; 0: it is in none

    @property
    def num_granules(self) -> int:
        """Its length."""
        return len(self.keys) // KEY_BYTES

    @property
    def end(self) -> int:
        """Number of the granule after its last."""
        return self.first + len(self.keys) // KEY_BYTES

    @property
    def head(self) -> bytes:
        """Key of its first granule."""
        return bytes(self.keys[:KEY_BYTES])

    def num_common(self, keys: bytes, last: int) -> int:
        """Of its granules, how many the prefix of `keys` up to granule `last` shares; it must share the first."""
        own, start = self.keys, self.first * KEY_BYTES
        num_granules = len(own) // KEY_BYTES
        count = last - self.first
        if num_granules <= count and keys.startswith(own, start):  # without a copy
            return num_granules
        count = min(num_granules, count)
        if keys[start : start + count * KEY_BYTES] == self.keys[: count * KEY_BYTES]:
            return count
        shared, differs = 1, count  # keys are chained: where two are equal, all before them are
        while differs - shared > 1:
            middle = (shared + differs) // 2
            offset = (middle - 1) * KEY_BYTES
            if keys[start + offset : start + offset + KEY_BYTES] == self.keys[offset : offset + KEY_BYTES]:
                shared = middle
            else:
                differs = middle
        return shared


class Match(NamedTuple):
    """The granules of a prefix that lie in the cache on one rank: [first, end). Holds nothing; ages with any change."""

    kvp_rank: int
    group: int
    first: int
    end: int
    deepest: Segment | None  # holds granule end - 1, perhaps more; None: no granule

    @property
    def num_granules(self) -> int:
        """How many there are."""
        return self.end - self.first


@dataclass(slots=True, eq=False)
class Holding:
    """What one sequence has of the cache on one of its shards.

    Its granules [first, end) are in the cache, but for `duplicates`: it computed those although another had published
    them first, and their blocks are its own, as are those of all granules from `end` on.
    """

    request_id: str
    session: str
    kvp_rank: int
    group: int
    first: int                 # granule number at which the shard begins
    end: int
    deepest: Segment | None    # referenced; it ends at `end`
    previous: Holding | None = None  # on the shard before
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # granules [from, to)

    @property
    def is_listed(self) -> bool:
        """Whether all it builds on can still be matched; if not, it was computed by a sequence that failed."""
        holding: Holding | None = self
        while holding is not None:
            if holding.deepest is not None and not holding.deepest.is_listed:
                return False
            holding = holding.previous
        return True


@dataclass(frozen=True, slots=True)
class Evicted:
    """Granules that have left the cache: `keys` from granule number `first` on."""

    kvp_rank: int
    group: int
    first: int
    keys: bytes
    waiters: tuple[str, ...]  # requests that watched them; each has to match and watch again
