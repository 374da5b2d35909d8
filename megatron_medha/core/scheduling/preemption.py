"""Who loses its KV when a decode needs a block and none can be had."""

from __future__ import annotations

from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.policies import relative_slack


def victim(
    memory: KVMemory, growing: Sequence, now_s: float, progress_share: float, overdue: Sequence | None
) -> Sequence | None:
    """Which sequence is preempted so that `growing` gets a block; None if all others are in flight.

    overdue: the prefill that a share of every step is kept for. Alone, `growing` itself begins again if it holds
    duplicates: it finds all that it has published, and does without them.
    """
    ranks = memory.growth_ranks(growing)
    owners = [
        seq
        for seq in memory.owners.values()
        if not seq.num_batches_in_flight
        and not seq.is_done
        and (seq is growing or any(shard.kvp_rank in ranks for shard in seq.block_table.shards))
    ]
    if all(seq is growing for seq in owners):
        others = [seq for seq in memory.owners.values() if seq is not growing]
        is_alone = not any(shard.kvp_rank in ranks for seq in others for shard in seq.block_table.shards)
        return growing if is_alone and any(one.duplicates for one in growing.block_table.holdings) else None
    kept = exempt(owners, now_s, progress_share, overdue)
    return max(
        owners,
        key=lambda seq: (
            -kept.count(seq.request_id), relative_slack(seq, now_s), seq.request.arrival_s, seq.request_id
        ),
    )  # fmt: skip


def exempt(owners: list[Sequence], now_s: float, progress_share: float, overdue: Sequence | None) -> list[str]:
    """Which owners are spared in overload: a long prefill that loses its KV again and again would never end.

    The longest overdue prefill, and the owner with the earliest deadline, most of all when they are the same: it
    runs to its end, then the next one is the earliest, so that every wait has an end.
    """
    if not progress_share:
        return []
    earliest = min(owners, key=lambda seq: (seq.deadline_s, seq.request.arrival_s, seq.request_id))
    kept = [overdue.request_id] if overdue is not None else []
    return kept + 2 * [earliest.request_id] if earliest.deadline_s < now_s else kept
