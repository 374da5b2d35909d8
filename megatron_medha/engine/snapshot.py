"""A momentary count of a scheduler's state, taken on its own thread for others to read."""

from __future__ import annotations

from megatron_medha.core.request import Status
from megatron_medha.core.scheduler import Scheduler
from megatron_medha.engine.ports import EngineLoad

NO_LOAD = EngineLoad(
    num_waiting=0, num_prefilling=0, num_decoding=0, num_free_blocks=0, num_blocks=0, num_waiting_tokens=0
)


def load_of(scheduler: Scheduler) -> EngineLoad:
    """Counts by status; O(live sequences)."""
    counts = dict.fromkeys(Status, 0)
    num_waiting_tokens = 0
    for seq in scheduler.sequences:
        counts[seq.status] += 1
        if seq.is_prefill:
            num_waiting_tokens += seq.num_unscheduled_tokens
    memory = scheduler.memory
    return EngineLoad(
        num_waiting=counts[Status.WAITING],
        num_prefilling=counts[Status.PREFILLING],
        num_decoding=counts[Status.DECODING],
        num_free_blocks=memory.num_free_blocks,
        num_blocks=memory.num_blocks * memory.kvp,
        num_waiting_tokens=num_waiting_tokens,
    )
