"""The simulation of what a server was asked, and how far both decided alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from experiments.simulator_against_engine.log import Calibration, ServedLog
from megatron_medha.core.batch import Batch, Completed, Event, Output
from megatron_medha.engine.decision_log import replay
from megatron_medha.engine.loop import serve
from megatron_medha.sim.world import SimulatedWorld

Decision = tuple[tuple[int, int, int], ...]  # of each chunk: prompt length of its request, start, tokens


class _Batches:
    """An Observer that keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self.batches.append(batch)


def simulate(
    log: ServedLog, calibration: Calibration, requests: Sequence[tuple[float, int, int]]
) -> tuple[dict[int, float], list[Decision]]:
    """TTFT by prompt length as the client would see it, and the decisions.

    requests: when each was meant to be sent, tokens of its prompt and of its answer. Of the log only the setup and
    what clients asked of each request (sampling, targets) are used, no times.
    """
    arrivals = []
    for at_s, length, num_output_tokens in requests:
        asked = log.arrivals[length][1]
        assert asked.max_output_tokens == num_output_tokens
        arrivals.append(replace(asked, request_id=f"p{length}", arrival_s=at_s + calibration.front_in_s))

    def outcome(batch: Batch, _: float) -> Completed:
        return Completed(batch_id=batch.batch_id, duration_s=calibration.reported(batch))

    world = SimulatedWorld(arrivals, calibration.whole, outcome=outcome)
    seen = _Batches()
    serve(log.setup.build(), world, (seen,))
    ttft_s = {
        length: world.records[f"p{length}"].token_times_s[0] + calibration.front_out_s - at_s
        for at_s, length, _ in requests
    }
    lengths = {f"p{length}": length for _, length, _ in requests}
    return ttft_s, chunks_of(seen.batches, lengths)


def chunks_of(batches: Iterable[Batch], lengths: dict[str, int]) -> list[Decision]:
    """Batches in words that two runs have in common."""
    return [
        tuple(sorted((lengths[chunk.request_id], chunk.start, chunk.num_tokens) for chunk in batch.chunks))
        for batch in batches
    ]


def agreement(log: ServedLog, real: list[Decision], simulated: list[Decision]) -> str:
    """How alike the decisions are, in words.

    A step that is 1% longer shifts every later one, and with that which decodes share a batch: batch by batch two runs
    of the very same server part soon. What is decided of each prompt, and in which order, does not depend on that.
    """
    names = set(log.lengths.values())
    simulated_names = {length for batch in simulated for length, _, _ in batch}
    # The first request, which only wakes the server, is not in the simulation.
    real = [kept for batch in real if (kept := tuple(part for part in batch if part[0] in simulated_names))]
    num_equal = next(
        (index for index, (a, b) in enumerate(zip(real, simulated, strict=False)) if a != b),
        min(len(real), len(simulated)),
    )
    plans, simulated_plans = _plans(real), _plans(simulated)
    num_same_plans = sum(plans[name] == simulated_plans[name] for name in simulated_names)
    num_chunks, num_simulated_chunks = (sum(map(len, found.values())) for found in (plans, simulated_plans))
    first, simulated_first = _first_tokens(real), _first_tokens(simulated)
    pairs = [
        (a, b) for a, b in combinations(sorted(simulated_names & names), 2) if first[a] != first[b]
    ]
    num_in_order = sum(
        (first[a] < first[b]) == (simulated_first[a] < simulated_first[b])
        for a, b in pairs
        if simulated_first[a] != simulated_first[b]
    )
    num_replayed = replay(iter(log.records), log.setup.build())
    return (
        f"decisions: {len(real):,} batches by the engine, {len(simulated):,} by the simulator, equal up to number "
        f"{num_equal:,}; {num_chunks:,} and {num_simulated_chunks:,} prefill chunks; {num_same_plans} of "
        f"{len(simulated_names)} prompts cut into the very same chunks; {num_in_order / len(pairs):.2%} of all pairs "
        f"of first tokens in the same order; given the engine's own events, all {num_replayed:,} batches are equal"
    )


def _plans(batches: Iterable[Decision]) -> dict[int, tuple[int, ...]]:
    """Sizes of every prompt's chunks."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        for length, start, count in batch:
            if start < length:
                found.setdefault(length, []).append(count)
    return {length: tuple(counts) for length, counts in found.items()}


def _first_tokens(batches: Iterable[Decision]) -> dict[int, int]:
    """By prompt length, the place of the batch that ended the prefill."""
    return {
        length: place
        for place, batch in enumerate(batches)
        for length, start, count in batch
        if start < length <= start + count
    }
