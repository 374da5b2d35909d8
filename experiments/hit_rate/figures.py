"""Hits of a run beside those of a clairvoyant eviction: as a share of prompt tokens, and of the seconds they save."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from experiments.hit_rate.access_trace import AccessTrace
from experiments.hit_rate.clairvoyant import belady_hits, hit_rate
from megatron_medha.engine.scheduler_setup import SchedulerSetup


def hit_figures(
    trace: AccessTrace, granule_tokens: int, capacity: int, setup: SchedulerSetup, eviction: str
) -> dict[str, float]:
    """Of a run; of the one by value also what a clairvoyant eviction and endless memory would have had.

    The clairvoyant one counts tokens, and is not the best for seconds: a token deep in a prompt costs more.
    """
    found = {"hit_rate": hit_rate(trace, trace.hits), "saved": saved_share(trace, trace.hits, setup)}
    if eviction == "value":
        known = belady_hits(trace, granule_tokens, capacity)
        found["clairvoyant"], found["clairvoyant_saved"] = hit_rate(trace, known), saved_share(trace, known, setup)
        found["infinite"] = hit_rate(trace, belady_hits(trace, granule_tokens, inf))
    return found


def saved_share(trace: AccessTrace, hits: Sequence[int], setup: SchedulerSetup) -> float:
    """Of the predicted seconds that all prompts would take whole, alone, those that hits save."""
    prefill_s = setup.build().predicted_prefill_s
    whole_s = sum(prefill_s(one.request.num_prompt_tokens) for one in trace.requests)
    return sum(prefill_s(num_tokens) for num_tokens in hits if num_tokens) / whole_s
