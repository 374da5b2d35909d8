"""A momentary view of a scheduler's state, taken on its own thread for others to read."""

from __future__ import annotations

from typing import NamedTuple

from megatron_medha.core.kv.sequence import Status
from megatron_medha.core.ports import EngineLoad
from megatron_medha.core.scheduling.scheduler import Scheduler

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


class PendingWork(NamedTuple):
    """What a scheduler has before it, by its cost model."""

    prefill_s: float      # of the prompts it has
    decode_share: float   # of each step's time budget that decodes take


NO_WORK = PendingWork(0.0, 0.0)


def work_of(scheduler: Scheduler) -> PendingWork:
    """Predicted from every live sequence; O(live sequences)."""
    prefill_s, num_decodes, context = 0.0, 0, 0
    for seq in scheduler.sequences:
        if seq.is_prefill:
            prefill_s += seq.remaining_work_s
        elif not seq.is_done:
            num_decodes += 1
            context += seq.num_known_tokens
    if not num_decodes:
        return PendingWork(prefill_s, 0.0)
    kvp = scheduler.memory.kvp
    decode_s = scheduler.cost.linear_s(-(-num_decodes // kvp), -(-num_decodes // kvp))
    decode_s += scheduler.cost.decode_attention_s(context // kvp)
    return PendingWork(prefill_s, decode_s / scheduler.config.step_budget_s)
