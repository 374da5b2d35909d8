"""Where one sequence's KV lies: its shards on KVP ranks, and the blocks of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.kv.segment import Holding


@dataclass(slots=True)
class KVShard:
    """One sequence's tokens [start, start + capacity) on one KVP rank."""

    kvp_rank: int
    start: int
    extents: list[Extent]
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_blocks = sum([extent.num_blocks for extent in self.extents])

    def append(self, extent: Extent) -> None:
        """Add blocks at the end, merged with the last extent where they touch."""
        last = self.extents[-1]
        if last.first_block + last.num_blocks == extent.first_block:
            self.extents[-1] = Extent(last.first_block, last.num_blocks + extent.num_blocks)
        else:
            self.extents.append(extent)
        self.num_blocks += extent.num_blocks


@dataclass(slots=True)
class BlockTable:
    """What one sequence has: its shards in token order; only the last can grow."""

    shards: list[KVShard] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)  # of the prefix cache, for each shard, where there is one
    unsent: list[KVOp] = field(default_factory=list)  # what the ranks have not been told of yet
    kvp_ranks: tuple[int, ...] = ()  # of the shards

    @property
    def num_blocks(self) -> int:
        """Blocks over all shards."""
        return sum(shard.num_blocks for shard in self.shards)
