"""What ranks do to block tables and blocks before the chunks of a batch: a batch carries these operations in order.

Each stage executes a batch's operations when its turn to compute the batch comes, so an earlier batch never sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from megatron_medha.core.kv.block_pool import Extent


class KVOp(NamedTuple):
    """One operation. A NamedTuple for the reason Chunk is one.

    append: `extents` at the end of the request's table on that rank; the first begins the table. All that a sequence
    takes when it begins comes with its first batch, on every KVP rank; decodes append as they grow.
    copy: what the blocks `sources` hold, in all layers of the group, to the blocks `extents`, on that rank.
    drop: the request's tables are forgotten, on every rank. Its tokens stay.
    """

    kind: Literal["append", "copy", "drop"]
    request_id: str
    group: int = 0
    kvp_rank: int = 0
    extents: tuple[Extent, ...] = ()
    sources: tuple[Extent, ...] = ()  # of a copy: as many blocks as `extents`


def append_op(request_id: str, kvp_rank: int, extents: Sequence[Extent], group: int = 0) -> KVOp:
    """Blocks at the end of a request's table."""
    return KVOp("append", request_id, group, kvp_rank, tuple(extents))


def copy_op(
    request_id: str, kvp_rank: int, sources: Sequence[Extent], extents: Sequence[Extent], group: int = 0
) -> KVOp:
    """The contents of `sources` to `extents`."""
    return KVOp("copy", request_id, group, kvp_rank, tuple(extents), tuple(sources))


def drop_op(request_id: str) -> KVOp:
    """A request's tables are forgotten."""
    return KVOp("drop", request_id)


def is_for(op: KVOp, kvp_rank: int) -> bool:
    """Whether that rank executes it."""
    return op.kind == "drop" or op.kvp_rank == kvp_rank
