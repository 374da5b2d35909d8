"""Prefills and decodes that have a simulated cluster to themselves, from its cost model alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.step_cost import StepLoad


def chunk_loads(cost: ClusterCost, num_tokens: int, chunk_tokens: int) -> Iterator[StepLoad]:
    """The steps of a prompt in fixed chunks."""
    for start in range(0, num_tokens, chunk_tokens):
        count = min(chunk_tokens, num_tokens - start)
        load = StepLoad()
        load.add_chunk(start, count, cost.attention_s(start, count))
        yield load


def prefill_s(cost: ClusterCost, num_tokens: int, chunk_tokens: int) -> float:
    """Seconds of a prompt whose next chunk starts when the last one has left all stages."""
    return sum(cost.step_s(load) for load in chunk_loads(cost, num_tokens, chunk_tokens))


def streamed_prefill_s(cost: ClusterCost, num_tokens: int, chunk_tokens: int) -> float:
    """Seconds of a prompt whose next chunk enters a stage as soon as the last one has left it (SPP)."""
    spp = cost.layout.spp
    free_s = [0.0] * spp
    for load in chunk_loads(cost, num_tokens, chunk_tokens):
        arrived_s = 0.0
        for stage in range(spp):
            free_s[stage] = max(free_s[stage], arrived_s) + cost.stage_s(load, stage)
            if stage < spp - 1:
                arrived_s = free_s[stage] + cost.hop_s(load.num_tokens, stage)
    return free_s[-1]


def decode_s(cost: ClusterCost, contexts: Sequence[int]) -> float:
    """Seconds of a step with one token of each of these requests."""
    load = StepLoad()
    total = sum(contexts) + len(contexts)
    load.add_decodes(len(contexts), total, cost.decode_attention_s(total))
    return cost.step_s(load)
