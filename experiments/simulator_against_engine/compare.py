"""The simulation of what a server was asked, and how far both decided alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from experiments.lib.recording_runtime import RecordingSimRuntime
from experiments.simulator_against_engine.log import Calibration, ServedLog, Step
from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.loop import serve
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.stats.decision_log import replay

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
    log: ServedLog, calibration: Calibration, meant_s: dict[int, float]
) -> tuple[dict[int, float], list[Decision]]:
    """TTFT by prompt length as the client would see it, and the decisions.

    meant_s: when the client meant to send each prompt of a stretch, before and after which the server was idle. Of the
    log are used what clients asked of each request, and of what was before the stretch what the scheduler had learnt.
    """
    arrivals = []
    for length, at_s in meant_s.items():
        asked = log.arrivals[length][1]
        arrivals.append(replace(asked, request_id=f"p{length}", arrival_s=at_s + calibration.front_in_s))
    steps = calibration.steps
    world = RecordingSimRuntime(arrivals, lambda batch: steps.whole_s(batch, batch.created_s), outcome=steps.completed)
    seen = _Batches()
    serve(_scheduler_at(log, min(meant_s.values())), world, (seen,))
    ttft_s = {
        length: world.records[f"p{length}"].token_times_s[0] + calibration.front_out_s - at_s
        for length, at_s in meant_s.items()
    }
    lengths = {f"p{length}": length for length in meant_s}
    return ttft_s, chunks_of(seen.batches, lengths)


def _scheduler_at(log: ServedLog, at_s: float) -> Scheduler:
    """The server's own, as it was at a moment when nothing ran."""
    scheduler = log.setup.build()
    for record in log.records:
        if record.now_s >= at_s:
            break
        if isinstance(record.entry, Batch):
            scheduler.schedule(record.now_s)
        else:
            scheduler.handle(record.entry, record.now_s)
    assert not scheduler.num_sequences, "something of the stretch before was still running"
    return scheduler


def decided_alike(
    log: ServedLog, calibration: Calibration, meant_s: dict[int, float], whole_s: Callable[[Step, float], float]
) -> dict[int, float]:
    """TTFT by prompt length had the server's batches, in their order, taken these seconds: no scheduler has a part."""
    lengths = log.lengths
    ttft_s: dict[int, float] = {}
    end_s = 0.0
    for step in log.steps:
        names = [lengths[chunk.request_id] for chunk in step.batch.chunks]
        if names[0] not in meant_s:
            continue
        start_s = max(end_s, *(meant_s[name] + calibration.front_in_s for name in names))
        end_s = start_s + whole_s(step, start_s)
        for name, chunk in zip(names, step.batch.chunks, strict=True):
            if chunk.samples_token:
                ttft_s.setdefault(name, end_s + calibration.front_out_s - meant_s[name])
    return ttft_s


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
    # Requests of the calibration are not in the simulation.
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
