"""A server's decision log as this experiment reads it, and what a calibration takes from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import dist, log1p
from pathlib import Path
from statistics import median
from typing import Any

from megatron_medha.core.batch import Arrived, Batch, Completed
from megatron_medha.core.cost import StepLoad
from megatron_medha.core.fitted_cost import FittedCost, MeasuredStep, fit
from megatron_medha.core.request import Request
from megatron_medha.engine.decision_log import Recorded, read_log
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.world import true_step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A batch that has run."""

    batch: Batch
    submitted_s: float
    completed_s: float
    reported_s: float  # by the rank: without messages and the scheduler's own time


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


class LikeSteps:
    """How long a batch takes: the fit, times what the fit was off by in the most similar steps that were measured.

    The fit is a law with eight coefficients, good to some percent; where a law is off, it is off in all similar steps,
    and a median over requests of one kind would be too.
    """

    _NUM_NEAREST = 24

    def __init__(self, fitted: FittedCost, steps: Sequence[Step], durations_s: Sequence[float]) -> None:
        self.fitted = fitted
        self._fitted_s = true_step_s(fitted)
        self._known = [
            (_place(step.batch), duration_s, self._fitted_s(step.batch))
            for step, duration_s in zip(steps, durations_s, strict=True)
        ]
        self._factors: dict[tuple[float, ...], float] = {}

    def __call__(self, batch: Batch) -> float:
        """Seconds."""
        place = _place(batch)
        key = tuple(round(4.0 * value) for value in place)  # 25% apart is near enough to share a factor
        if key not in self._factors:
            nearest = nsmallest(self._NUM_NEAREST, self._known, key=lambda known: dist(known[0], place))
            self._factors[key] = sum(known[1] for known in nearest) / sum(known[2] for known in nearest)
        return self._fitted_s(batch) * self._factors[key]


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

    whole: LikeSteps      # seconds from a batch's submission until the scheduler hears of its end
    reported: LikeSteps   # seconds that ranks report, of which the scheduler learns
    front_in_s: float     # from the moment a client means to send until the scheduler hears of it
    front_out_s: float    # from the end of the first token's step until the client has it

    @property
    def error_p50(self) -> float:
        """Relative, of steps held out of the fit."""
        return self.whole.fitted.error_p50

    @property
    def error_p95(self) -> float:
        """Relative, of steps held out of the fit."""
        return self.whole.fitted.error_p95


def calibrate(log: ServedLog, began_s: float, meant_s: dict[int, float], ttft_s: dict[int, float]) -> Calibration:
    """From a log and what the client knows by prompt length: when it meant to send, after began_s; TTFT since then."""
    setup = log.setup
    assert setup.layout.world_size == 1, "loads below are those of one rank"
    loads = [load_of(step.batch) for step in log.steps]

    def fitted(durations_s: list[float]) -> LikeSteps:
        steps = [MeasuredStep(load, duration_s) for load, duration_s in zip(loads, durations_s, strict=True)]
        law = fit(steps, shape=setup.shape, chip=setup.hardware.name, dtype="served")
        return LikeSteps(law, log.steps, durations_s)

    return Calibration(
        whole=fitted([step.completed_s - step.submitted_s for step in log.steps]),
        reported=fitted([step.reported_s for step in log.steps]),
        front_in_s=median(log.arrivals[length][0] - began_s - at_s for length, at_s in meant_s.items()),
        front_out_s=median(
            began_s + meant_s[length] + seconds - log.first_tokens_s[length] for length, seconds in ttft_s.items()
        ),
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
