"""Decision logs of earlier formats: what was renamed since, and how the blocks they name are compared with today's.

Up to format 2 a chunk named its new blocks: the first chunk on a KVP rank those of the whole shard, a decode those it
had grown by. From format 3 on a batch has KV operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megatron_medha.core.batch import Batch
from megatron_medha.core.kv.block_pool import Extent

# Raised when a key or an event is renamed; what is older is translated here.
FORMAT = 3
_FIRST_WITH_OPS = 3
_GRANULE_TOKENS_OF_THEN = 64  # at least, of a granule, in logs that do not name it
# Keys of the scheduler's configuration in format 1 by today's names; None: nothing read it.
_KEYS_OF_FORMAT_1 = {"max_saved_gift_steps": "max_banked_steps", "long_prefill_tokens": None}


def translate_header(header: dict[str, Any], log_format: int) -> None:
    """Give the keys of an earlier format their names of today, and what was left to a default its value of then."""
    kv: Any = header.get("kv")
    block_size: Any = header.get("block_size")
    is_cached = isinstance(kv, dict) and kv.get("prefix_cache") is True
    if is_cached and kv.get("granule_tokens") is None and isinstance(block_size, int) and block_size > 0:
        kv["granule_tokens"] = -(-_GRANULE_TOKENS_OF_THEN // block_size) * block_size
    if log_format == 1 and isinstance(header.get("config"), dict):
        renamed = {_KEYS_OF_FORMAT_1.get(key, key): value for key, value in header["config"].items()}
        header["config"] = {key: value for key, value in renamed.items() if key is not None}


def tables_for(log_format: int) -> SentTables | None:
    """For a log whose chunks name their blocks."""
    return SentTables() if log_format < _FIRST_WITH_OPS else None


def take_new_extents(batch: dict[str, Any]) -> tuple[tuple[Extent, ...], ...]:
    """The blocks that each chunk names, taken out of the record."""
    named = [chunk.pop("new_extents") if isinstance(chunk, dict) else chunk.pop() for chunk in batch["chunks"]]
    return msgspec.convert(named, tuple[tuple[Extent, ...], ...])


@dataclass(slots=True)
class _SentTable:
    """What batches have sent of one request's table on one KVP rank, and how much of it the log has named."""

    blocks: list[int] = field(default_factory=list)
    num_named: int = 0


class SentTables:
    """The tables that batches have sent, by request."""

    def __init__(self) -> None:
        self._tables: dict[str, defaultdict[int, _SentTable]] = {}  # by KVP rank

    def clear(self) -> None:
        """The ranks came up empty."""
        self._tables.clear()

    def agree(self, batch: Batch, recorded: Batch, named: Sequence[Sequence[Extent]]) -> bool:
        """Whether a batch is the recorded one, and its operations bring each chunk's rank the blocks named there."""
        for request_id in batch.released:
            self._tables.pop(request_id, None)
        for op in batch.kv_ops:
            if op.kind == "drop":
                self._tables.pop(op.request_id, None)
            else:
                self._table(op.request_id, op.kvp_rank).blocks.extend(_numbers(op.extents))
        if batch._replace(kv_ops=()) != recorded:
            return False
        return all(
            self._names(chunk.request_id, chunk.kvp_ranks[-1], extents)
            for chunk, extents in zip(batch.chunks, named, strict=True)
        )

    def _names(self, request_id: str, kvp_rank: int, extents: Sequence[Extent]) -> bool:
        table, blocks = self._table(request_id, kvp_rank), _numbers(extents)
        is_same = table.blocks[table.num_named :] == blocks
        table.num_named += len(blocks)
        return is_same

    def _table(self, request_id: str, kvp_rank: int) -> _SentTable:
        return self._tables.setdefault(request_id, defaultdict(_SentTable))[kvp_rank]


def _numbers(extents: Sequence[Extent]) -> list[int]:
    return [block for first, count in extents for block in range(first, first + count)]
