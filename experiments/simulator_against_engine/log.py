"""What a calibration takes from a server's decision log and a grid of measured steps."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import dist, exp, log, log1p
from operator import mul
from statistics import median

from experiments.lib.served_log import ServedLog, Step
from megatron_medha.core.batch import Batch, Completed
from megatron_medha.core.cost.fitted_cost import FittedCost, MeasuredStep, features_of
from megatron_medha.core.cost.step_cost import StepLoad

_NUM_SIMILAR = 4
_PACE_S = 0.15        # how far a step's neighbours tell of it; what two steps share is halved after 0.2 s
_NUM_PATHS = 2        # stretches of calibration whose pace a simulation may follow: before and after what is simulated
_PRIOR_WEIGHT = 0.3   # of the stretch's mean among a step's neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A grid of steps that nobody decided, as they were measured, and the law fitted to them."""

    law: FittedCost
    steps: tuple[MeasuredStep, ...]

    def seconds(self, load: StepLoad) -> float:
        """The law's, times what it is off by in the steps that are most similar: it is straight where steps are not."""
        place = _place(load)
        nearest = nsmallest(_NUM_SIMILAR, self.steps, key=lambda step: dist(_place(step.load), place))
        weights = [1.0 / (0.1 + dist(_place(step.load), place)) for step in nearest]
        off_by = sum(
            weight * step.duration_s / self._law_s(step.load) for weight, step in zip(weights, nearest, strict=True)
        )
        return self._law_s(load) * off_by / sum(weights)

    def _law_s(self, load: StepLoad) -> float:
        return sum(map(mul, self.law.theta, features_of(load, self.law.hinges_tokens)))


def _place(load: StepLoad) -> tuple[float, ...]:
    """Where a step stands among others: logarithms of what is in it, and apart whether it has a chunk."""
    num_decodes = load.num_sequences - 1 if load.chunk_context else load.num_sequences
    return (
        10.0 if load.chunk_context else 0.0,
        2.0 * log1p(load.num_tokens - num_decodes),
        0.5 * log1p(load.chunk_context),
        log1p(num_decodes),
        0.25 * log1p(load.decode_context),
    )


class MachineSteps:
    """How long steps take on a machine whose pace changes: the law's seconds, times the pace, times what is left.

    grid: what they take by a law that nobody's decisions are in. One fitted to what a server ran is wrong: it fills
    steps to a budget, so large chunks are those of moments when the machine was fast, and 64 tokens seem to cost
    hardly more than 32.

    The pace is what the steps around a step took over the law. In a simulation it is that of a stretch of calibration
    before or after what is simulated, as machines change within minutes, begun anywhere; what is left is that of one
    of all the calibration's steps, so that steps scatter as they did. A scheduler that sees steps without
    scatter learns other things than one that sees real ones: it aims lower the more steps break their budget.
    """

    def __init__(self, grid: Grid, stretches: Sequence[Sequence[Step]]) -> None:
        self._grid = grid
        self.paces: list[float] = []
        self._paths: list[tuple[float, list[float], list[float]]] = []  # when it began, when each step did, the pace
        # Of each step what is left of its seconds, and of those the share that ranks report; by whether it has a chunk.
        self._left: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for stretch in stretches:
            over_law = [step.whole_s / grid.seconds(load_of(step.batch)) for step in stretch]
            paces = _paces(stretch, over_law)
            began_s = stretch[0].submitted_s
            self._paths.append((began_s, [step.submitted_s - began_s for step in stretch], paces))
            self.paces += paces
            for step, ratio, pace in zip(stretch, over_law, paces, strict=True):
                self._left[has_prefill(step.batch)].append((ratio / pace, step.reported_s / step.whole_s))
        self.begin(0, 0.0)

    def begin(self, seed: int, now_s: float) -> None:
        """Begin another series of draws at a moment."""
        self._draw = random.Random(seed)
        nearest = nsmallest(_NUM_PATHS, self._paths, key=lambda path: abs(path[0] + 0.5 * path[1][-1] - now_s))
        _, self._times_s, self._pace = self._draw.choice(nearest)
        self._offset_s = self._draw.uniform(0.0, self._times_s[-1]) - now_s
        self._reported: tuple[int, float] = (-1, 0.0)

    def whole_s(self, batch: Batch, now_s: float) -> float:
        """Seconds from a batch's submission, now, until the scheduler hears of its end; drawn again at each call."""
        left, reported_share = self._draw.choice(self._left[has_prefill(batch)])
        place = bisect_right(self._times_s, (self._offset_s + now_s) % self._times_s[-1]) - 1
        whole_s = self._grid.seconds(load_of(batch)) * self._pace[place] * left
        self._reported = batch.batch_id, whole_s * reported_share
        return whole_s

    def completed(self, batch: Batch, _: float) -> Completed:
        """What the scheduler learns of the batch drawn last: the time that ranks report, from which it learns."""
        batch_id, duration_s = self._reported
        assert batch_id == batch.batch_id
        return Completed(batch_id=batch_id, duration_s=duration_s)

    @property
    def left(self) -> list[float]:
        """Of all steps of the calibration, the seconds over those of the law at the machine's pace then."""
        return [left for kind in self._left.values() for left, _ in kind]


def has_prefill(batch: Batch) -> bool:
    """Whether anything but decodes is in it."""
    return any(chunk.num_tokens > 1 or not chunk.start for chunk in batch.chunks)


def _paces(stretch: Sequence[Step], over_law: Sequence[float]) -> list[float]:
    """The machine's pace at every step, from what the steps around it took, over the law; a step's own is left out."""
    logs = [log(ratio) for ratio in over_law]
    found = []
    mean = sum(logs) / len(logs)
    for index, step in enumerate(stretch):
        weight, total = _PRIOR_WEIGHT, _PRIOR_WEIGHT * mean
        for others in (range(index - 1, -1, -1), range(index + 1, len(stretch))):
            for other in others:
                apart_s = abs(stretch[other].submitted_s - step.submitted_s)
                if apart_s > 3.0 * _PACE_S:
                    break
                weight += (share := exp(-apart_s / _PACE_S))
                total += share * logs[other]
        found.append(exp(total / weight))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a simulation of this machine needs to know."""

    steps: MachineSteps
    front_in_s: float   # from the moment a client means to send until the scheduler hears of it
    front_out_s: float  # from the end of the first token's step until the client has it


def calibrate(
    grid: Grid, log: ServedLog, stretches: Sequence[tuple[dict[int, float], dict[int, float]]]
) -> Calibration:
    """From the steps of these stretches, and from what the client knows of them.

    Of each, by prompt length: when the client meant to send it, of the server's clock, and the seconds from then to its
    first token.
    """
    assert log.setup.layout.world_size == 1, "the law is that of one rank"
    lengths = log.lengths
    known = [(length, at_s, ttft_s[length]) for meant_s, ttft_s in stretches for length, at_s in meant_s.items()]
    steps = [
        [step for step in log.steps if lengths[step.batch.chunks[0].request_id] in meant_s] for meant_s, _ in stretches
    ]
    return Calibration(
        steps=MachineSteps(grid, steps),
        front_in_s=median(log.arrivals[length][0] - at_s for length, at_s, _ in known),
        front_out_s=median(at_s + seconds - log.first_tokens_s[length] for length, at_s, seconds in known),
    )


def load_of(batch: Batch) -> StepLoad:
    """What one rank has to compute in it."""
    load = StepLoad()
    for chunk in batch.chunks:
        if chunk.num_tokens == 1 and chunk.start:
            load.add_decodes(1, chunk.start + 1, 0.0)
        else:
            load.add_chunk(chunk.start, chunk.num_tokens, 0.0)
    return load
