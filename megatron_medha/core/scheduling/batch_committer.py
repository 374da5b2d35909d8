"""From a plan to a batch in flight: the cursors of its sequences move, and their operations on block tables go out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.kv.shards import num_shards
from megatron_medha.core.scheduling.batch_builder import PlannedChunk
from megatron_medha.core.scheduling.cached_prefixes import CachedPrefixes
from megatron_medha.core.scheduling.deadlines import Deadlines
from megatron_medha.core.scheduling.overdue import OverdueHeap
from megatron_medha.core.scheduling.prefill_queue import PrefillQueue


@dataclass(slots=True, eq=False)
class SubmittedBatch:
    """A batch the runtime has, with what the cost model needs to learn from it."""

    batch: Batch
    sequences: list[Sequence]  # of its chunks, in their order
    num_decodes: int           # they come first
    load: StepLoad
    has_left_first_stage: bool = False
    held_s: float = 0.0        # predicted, of the batches that have overtaken it so far


class BatchCommitter:
    """Turns what was planned into chunks. It keeps nothing of its own.

    prefixes: None: there is no prefix cache.
    """

    def __init__(
        self, memory: KVMemory, deadlines: Deadlines, overdue: OverdueHeap, prefills: PrefillQueue,
        prefixes: CachedPrefixes | None,
    ) -> None:  # fmt: skip
        self._memory = memory
        self._deadlines = deadlines
        self._overdue = overdue
        self._prefills = prefills
        self._prefixes = prefixes

    def commit(
        self, decodes: list[Sequence], planned: list[PlannedChunk], kv_ops: list[KVOp], now_s: float
    ) -> tuple[Chunk, ...]:
        """The chunks of a batch, decodes first; what its ranks have to do to block tables is added to kv_ops."""
        chunks: list[Chunk] = []
        new_tuple, chunk = tuple.__new__, Chunk  # half the time of the class's own
        for seq in decodes:
            start, table = seq.num_scheduled_tokens, seq.block_table
            seq.num_scheduled_tokens = start + 1
            seq.num_batches_in_flight = 1
            if table.unsent:
                kv_ops += table.unsent
                table.unsent.clear()
            chunks.append(new_tuple(chunk, (seq.request_id, start, 1, True, table.kvp_ranks)))
        for one in planned:
            chunks.append(self._prefill(one.seq, one.num_tokens, kv_ops, now_s))
        return tuple(chunks)

    def _prefill(self, seq: Sequence, num_tokens: int, kv_ops: list[KVOp], now_s: float) -> Chunk:
        start = seq.num_scheduled_tokens
        if seq.is_waiting:
            seq.move_to(Status.PREFILLING)
            if self._prefixes is not None:
                self._prefixes.begin(seq, start)
            if seq.first_scheduled_s is None:
                seq.first_scheduled_s = now_s
            kv_ops += seq.block_table.unsent
            seq.block_table.unsent.clear()
        seq.num_scheduled_tokens = end = start + num_tokens
        seq.last_chunk_tokens = num_tokens
        seq.num_batches_in_flight += 1
        if self._deadlines.follow(seq):
            self._overdue.add(seq)
        if self._prefixes is not None:
            self._prefixes.siblings.follow_lead(seq)
        if seq.num_unscheduled_tokens:
            self._prefills.add(seq, now_s)  # nobody asks for its next chunk before this one has left stage 0
        else:
            self._prefills.discard(seq, now_s)
        ranks = seq.block_table.kvp_ranks[: num_shards(end, self._memory.shard_tokens)]
        return tuple.__new__(Chunk, (seq.request_id, start, num_tokens, end == seq.num_known_tokens, ranks))
