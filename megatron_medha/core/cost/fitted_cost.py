"""A cost model fitted to measured steps: non-negative least squares on relative errors. Measuring is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.model_shape import ModelShape

NUM_FEATURES = 8
# Where the cost of tokens may change its slope: weights are read up to one of them, FLOPs count from there on.
_HINGE_CANDIDATES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_SWEEPS = 400        # of coordinate descent; normalised features converge to 1e-6 in far fewer on all grids tried
_CONVERGED = 1e-9    # largest relative change in a sweep that ends it
_HELD_OUT = 5        # every fifth measured point is predicted by a fit that has not seen it
MIN_STEPS = 3 * _HELD_OUT


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step that has run: what was in it, and how long it took."""

    load: StepLoad
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCost:
    """Predicted seconds = theta . features; the features are those of OnlineCost, so that it can go on from here.

    gram and moments are the normal equations of the measured steps, which is all that learning on needs of them.
    """

    shape: ModelShape
    chip: str
    dtype: str
    hinges_tokens: tuple[float, float]
    theta: tuple[float, ...]
    gram: tuple[tuple[float, ...], ...]
    moments: tuple[float, ...]
    num_steps: int
    error_p50: float  # relative, of steps the fit had not seen
    error_p95: float


def fit(steps: Sequence[MeasuredStep], *, shape: ModelShape, chip: str, dtype: str) -> FittedCost:
    """The best fit over all steps, its error stated on steps held out of another. At least MIN_STEPS."""
    assert len(steps) >= MIN_STEPS, f"{len(steps)} steps are too few for {NUM_FEATURES} coefficients"
    hinges = min(
        combinations(_HINGE_CANDIDATES, 2),
        key=lambda pair: _squared_error(steps, pair, _solve(*_equations(steps, pair))),
    )
    errors = []
    for fold in range(_HELD_OUT):
        kept = [step for index, step in enumerate(steps) if index % _HELD_OUT != fold]
        theta = _solve(*_equations(kept, hinges))
        errors += [abs(1.0 - fitted) for fitted in _fitted(steps[fold::_HELD_OUT], hinges, theta)]
    errors.sort()
    gram, moments = _equations(steps, hinges)
    return FittedCost(
        shape=shape,
        chip=chip,
        dtype=dtype,
        hinges_tokens=hinges,
        theta=tuple(_solve(gram, moments)),
        gram=tuple(map(tuple, gram)),
        moments=tuple(moments),
        num_steps=len(steps),
        error_p50=errors[len(errors) // 2],
        error_p95=errors[int(0.95 * len(errors))],
    )


def features_of(load: StepLoad, hinges_tokens: tuple[float, float]) -> list[float]:
    """1, tokens, tokens past each hinge, sequences, query-key pairs of chunks, keys read by chunks and by decodes."""
    low, high = hinges_tokens
    tokens = load.num_tokens
    return [
        1.0, tokens, max(0.0, tokens - low), max(0.0, tokens - high), load.num_sequences,
        load.chunk_pairs, load.chunk_context, load.decode_context,
    ]  # fmt: skip


def _equations(steps: Sequence[MeasuredStep], hinges: tuple[float, float]) -> tuple[list[list[float]], list[float]]:
    """gram . theta = moments, each step weighted by 1 / duration: errors count in percent."""
    gram = [[0.0] * NUM_FEATURES for _ in range(NUM_FEATURES)]
    moments = [0.0] * NUM_FEATURES
    for step in steps:
        features = [value / step.duration_s for value in features_of(step.load, hinges)]
        for i, feature in enumerate(features):
            moments[i] += feature
            for j, other in enumerate(features):
                gram[i][j] += feature * other
    return gram, moments


def _solve(gram: list[list[float]], moments: list[float]) -> list[float]:
    """Least squares with every coefficient >= 0, one coefficient at a time, in units in which the diagonal is 1."""
    unit = [gram[i][i] ** -0.5 if gram[i][i] > 0.0 else 0.0 for i in range(NUM_FEATURES)]
    scaled = [[gram[i][j] * unit[i] * unit[j] for j in range(NUM_FEATURES)] for i in range(NUM_FEATURES)]
    target = [moments[i] * unit[i] for i in range(NUM_FEATURES)]
    theta = [0.0] * NUM_FEATURES
    for _ in range(_SWEEPS):
        largest_change = 0.0
        for i, row in enumerate(scaled):
            if not unit[i]:
                continue  # nothing measured has this feature
            others = sum(a * b for a, b in zip(row, theta, strict=True)) - row[i] * theta[i]
            value = max(0.0, (target[i] - others) / row[i])
            largest_change = max(largest_change, abs(value - theta[i]))
            theta[i] = value
        if largest_change <= _CONVERGED * max(theta):
            break
    return [value * scale for value, scale in zip(theta, unit, strict=True)]


def _fitted(steps: Sequence[MeasuredStep], hinges: tuple[float, float], theta: Sequence[float]) -> list[float]:
    """Predicted over actual."""
    return [
        sum(a * b for a, b in zip(features_of(step.load, hinges), theta, strict=True)) / step.duration_s
        for step in steps
    ]


def _squared_error(steps: Sequence[MeasuredStep], hinges: tuple[float, float], theta: Sequence[float]) -> float:
    return sum((1.0 - fitted) ** 2 for fitted in _fitted(steps, hinges, theta))
