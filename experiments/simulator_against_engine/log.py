"""A server's decision log as this experiment reads it, and what a calibration takes from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import dist, log1p
from pathlib import Path
from statistics import NormalDist, correlation, median
from typing import Any

from megatron_medha.core.batch import Arrived, Batch, Completed
from megatron_medha.core.cost import StepLoad
from megatron_medha.core.fitted_cost import MeasuredStep, fit
from megatron_medha.core.request import Request
from megatron_medha.engine.decision_log import Recorded, read_log
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.world import true_step_s

_NUM_SIMILAR = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A batch that has run."""

    batch: Batch
    submitted_s: float
    completed_s: float
    reported_s: float  # by the rank: without messages and the scheduler's own time

    @property
    def whole_s(self) -> float:
        """From its submission until the scheduler heard of its end."""
        return self.completed_s - self.submitted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLog:
    """What happened on one server."""

    header: dict[str, Any]
    records: tuple[Recorded, ...]
    arrivals: dict[int, tuple[float, Request]]  # by prompt length: when the scheduler heard of it
    first_tokens_s: dict[int, float]            # by prompt length: when the scheduler heard of the step's end
    steps: tuple[Step, ...]

    @property
    def setup(self) -> SchedulerSetup:
        """Of the scheduler, as it was at the start."""
        return SchedulerSetup.from_header(self.header)

    @property
    def lengths(self) -> dict[str, int]:
        """Prompt length by request id."""
        return {request.request_id: length for length, (_, request) in self.arrivals.items()}

    @property
    def batches(self) -> list[Batch]:
        """In the order in which they ran."""
        return [step.batch for step in self.steps]

    @classmethod
    def read(cls, path: Path) -> ServedLog:
        """A log to its end."""
        with path.open(encoding="utf-8") as lines:
            header, found = read_log(lines)
            records = tuple(found)
        arrivals: dict[int, tuple[float, Request]] = {}
        lengths: dict[str, int] = {}
        first_tokens_s: dict[int, float] = {}
        in_flight: dict[int, tuple[Batch, float]] = {}
        steps: list[Step] = []
        for record in records:
            entry = record.entry
            if isinstance(entry, Arrived):
                request = entry.request
                arrivals[request.num_prompt_tokens] = record.now_s, request
                lengths[request.request_id] = request.num_prompt_tokens
            elif isinstance(entry, Batch):
                in_flight[entry.batch_id] = entry, record.now_s
            elif isinstance(entry, Completed):
                batch, submitted_s = in_flight.pop(entry.batch_id)
                steps.append(
                    Step(batch=batch, submitted_s=submitted_s, completed_s=record.now_s, reported_s=entry.duration_s)
                )
                for chunk in batch.chunks:
                    if chunk.samples_token:
                        first_tokens_s.setdefault(lengths[chunk.request_id], record.now_s)
        return cls(
            header=header,
            records=records,
            arrivals=arrivals,
            first_tokens_s=first_tokens_s,
            steps=tuple(steps),
        )


class SimilarSteps:
    """How long a batch takes: what a similar step of the calibration took, corrected for what the two differ by.

    Which of the most similar ones is drawn, so that steps scatter as they did. A scheduler that is told of steps
    without scatter learns other things than one that is told of real ones: it aims lower the more steps break their
    budget, and where a law of eight coefficients is 10% off, without scatter all steps of a kind break it or none do.
    Neighbouring steps are slow or fast together as much as those of the calibration were.
    """

    def __init__(self, steps: Sequence[Step], setup: SchedulerSetup) -> None:
        assert setup.layout.world_size == 1, "loads below are those of one rank"
        measured = [MeasuredStep(load_of(step.batch), step.whole_s) for step in steps]
        self.law = fit(measured, shape=setup.shape, chip=setup.hardware.name, dtype="served")
        self._law_s = true_step_s(self.law)
        self._known = [(_place(step.batch), step, step.whole_s / self._law_s(step.batch)) for step in steps]
        self._similar: dict[tuple[float, ...], list[tuple[Step, float]]] = {}
        self.persistence = _persistence([self._rank_of(step) for step in steps])
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin another series of draws."""
        self._draw = random.Random(seed)
        self._state = self._draw.gauss(0.0, 1.0)
        self._reported: tuple[int, float] = (-1, 0.0)

    def whole_s(self, batch: Batch) -> float:
        """Seconds from a batch's submission until the scheduler hears of its end; drawn anew at each call."""
        similar = self._similar_to(batch)
        self._state = self.persistence * self._state + (1.0 - self.persistence**2) ** 0.5 * self._draw.gauss(0.0, 1.0)
        step, _ = similar[int(NormalDist().cdf(self._state) * len(similar))]
        scale = self._law_s(batch) / self._law_s(step.batch)
        self._reported = batch.batch_id, scale * step.reported_s
        return scale * step.whole_s

    def completed(self, batch: Batch, _: float) -> Completed:
        """What the scheduler is told of the batch drawn last: the time that ranks report, from which it learns."""
        batch_id, duration_s = self._reported
        assert batch_id == batch.batch_id
        return Completed(batch_id=batch_id, duration_s=duration_s)

    def _similar_to(self, batch: Batch) -> list[tuple[Step, float]]:
        """Steps with their times over the law's, the fastest first."""
        place = _place(batch)
        key = tuple(round(4.0 * value) for value in place)  # 25% apart is near enough to share them
        if key not in self._similar:
            nearest = nsmallest(_NUM_SIMILAR, self._known, key=lambda known: dist(known[0], place))
            self._similar[key] = sorted(((step, ratio) for _, step, ratio in nearest), key=lambda known: known[1])
        return self._similar[key]

    def _rank_of(self, step: Step) -> float:
        """Where a step stands among those similar to it: of a standard normal distribution."""
        ratio = step.whole_s / self._law_s(step.batch)
        ratios = [known for _, known in self._similar_to(step.batch)]
        below = sum(known < ratio for known in ratios)
        return NormalDist().inv_cdf((below + 0.5) / (len(ratios) + 1))


def _persistence(states: Sequence[float]) -> float:
    """Correlation of each with the next."""
    return max(0.0, correlation(states[1:], states[:-1]))


def _place(batch: Batch) -> tuple[float, ...]:
    """Where a batch stands among others: logarithms of what is in it, and apart whether it has prefill chunks."""
    load = load_of(batch)
    num_decodes = sum(chunk.num_tokens == 1 and chunk.start > 0 for chunk in batch.chunks)
    return (
        100.0 if load.chunk_context else 0.0,
        log1p(load.num_tokens - num_decodes),
        0.5 * log1p(load.chunk_context),
        log1p(num_decodes),
        0.25 * log1p(load.decode_context),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a simulation of this machine needs to know."""

    steps: SimilarSteps
    front_in_s: float   # from the moment a client means to send until the scheduler hears of it
    front_out_s: float  # from the end of the first token's step until the client has it


def calibrate(log: ServedLog, meant_s: dict[int, float], ttft_s: dict[int, float]) -> Calibration:
    """From the steps of these prompts, and from what the client knows of them.

    By prompt length: when the client meant to send it, of the server's clock, and the seconds from then to its first
    token.
    """
    lengths = log.lengths
    return Calibration(
        steps=SimilarSteps(
            [step for step in log.steps if lengths[step.batch.chunks[0].request_id] in meant_s], log.setup
        ),
        front_in_s=median(log.arrivals[length][0] - at_s for length, at_s in meant_s.items()),
        front_out_s=median(at_s + ttft_s[length] - log.first_tokens_s[length] for length, at_s in meant_s.items()),
    )


def load_of(batch: Batch) -> StepLoad:
    """What one rank had to compute in it."""
    load = StepLoad()
    for chunk in batch.chunks:
        if chunk.num_tokens == 1 and chunk.start:
            load.add_decodes(1, chunk.start + 1, 0.0)
        else:
            load.add_chunk(chunk.start, chunk.num_tokens, 0.0)
    return load
