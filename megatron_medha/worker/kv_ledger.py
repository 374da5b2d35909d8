"""A rank's own book of who holds which blocks, kept beside its slot tables where it is audited."""

from __future__ import annotations

from megatron_medha.cluster.messages import Step
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.worker.batch_tensors import KVShards


class KVLedger:
    """Blocks by request, from the steps alone; AssertionError where a request holds a block twice, or one that is none.

    Two requests may hold the same block here: one that lost its KV is not told of until it starts again.
    """

    def __init__(self, num_blocks: int, shards: KVShards) -> None:
        self._num_blocks = num_blocks
        self._shards = shards
        self._extents: dict[str, list[Extent]] = {}

    def announced(self, step: Step, num_requests: int) -> tuple[int, int]:
        """Note a step; (requests remembered, blocks held) with it, for the front to compare."""
        for request_id in step.released:
            self._extents.pop(request_id, None)
        for new in step.new_requests:  # an id that is known already begins anew
            self._extents[new.request_id] = []
        for chunk in step.chunks:
            if self._shards.is_last_of(chunk):
                if chunk.start == self._shards.first_token(chunk):
                    self._extents[chunk.request_id] = []
                self._extents[chunk.request_id].extend(Extent(*extent) for extent in chunk.new_extents)
        for name, extents in self._extents.items():
            end = 0
            for start, count in sorted(extents):
                assert start >= end, f"{name} holds block {start} twice"
                end = start + count
            assert end <= self._num_blocks, f"block {end - 1} of {name} is none of {self._num_blocks}"
        return num_requests, sum(count for extents in self._extents.values() for _, count in extents)
