"""The fit finds the law that made the steps, and learning goes on from it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from megatron_medha.core.cost.fitted_cost import (
    NUM_FEATURES,
    FittedCost,
    MeasuredStep,
    _solve,
    features_of,
    fit,
)
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost, StepLoad, step_s
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup

SHAPE = ModelShape(
    name="small", num_layers=4, hidden_size=512, ffn_hidden_size=1376, num_heads=8, num_kv_heads=2, head_dim=64,
    vocab_size=4096, max_context_len=65_536,
)  # fmt: skip
HARDWARE = Hardware(name="slow", flops_per_s=1e10, memory_bytes_per_s=1e9)


def true_s(load: StepLoad) -> float:
    """A machine: 2 ms, weights read up to 64 tokens, then FLOPs; pairs, keys of chunks, keys of decodes."""
    linear_s = 2e-3 + 1e-6 * load.num_tokens + 2e-5 * max(0, load.num_tokens - 64) + 3e-5 * load.num_sequences
    return linear_s + 4e-9 * load.chunk_pairs + 1e-8 * load.chunk_context + 5e-8 * load.decode_context


def steps(noise: float = 0.0, seed: int = 0) -> list[MeasuredStep]:
    random_ = random.Random(seed)
    measured = []
    for _ in range(80):
        load = StepLoad()
        if random_.random() < 0.7:
            load.add_chunk(random_.choice((0, 500, 30_000)), random_.choice((2, 16, 64, 256, 1024)), 0.0)
        if not load.num_tokens or random_.random() < 0.5:
            count = random_.choice((1, 4, 16))
            load.add_decodes(count, count * random_.choice((10, 3000, 60_000)), 0.0)
        measured.append(MeasuredStep(load, true_s(load) * random_.uniform(1 - noise, 1 + noise)))
    return measured


def fitted_s(cost: FittedCost, load: StepLoad) -> float:
    return sum(a * b for a, b in zip(cost.theta, features_of(load, cost.hinges_tokens)))


def predicted_s(cost: OnlineCost, load: StepLoad) -> float:
    attention_s = cost.attention_s(0, 1) * 0.0 + cost.decode_attention_s(load.decode_context)
    if load.chunk_context:
        num_tokens = load.num_tokens - (load.num_sequences - 1)
        attention_s += cost.attention_s(load.chunk_context - num_tokens, num_tokens)
    load.attention_s = attention_s
    return step_s(cost, load)


def test_the_fit_finds_the_law_behind_exact_steps() -> None:
    fitted = fit(steps(), shape=SHAPE, chip="test", dtype="float32")
    assert fitted.error_p95 < 1e-3
    for step in steps(seed=1):
        assert fitted_s(fitted, step.load) == pytest.approx(step.duration_s, rel=5e-3)


def test_noise_of_five_percent_costs_no_more_than_that_and_is_stated() -> None:
    fitted = fit(steps(noise=0.05), shape=SHAPE, chip="test", dtype="float32")
    errors = sorted(abs(1 - fitted_s(fitted, s.load) / s.duration_s) for s in steps(seed=1))
    assert errors[int(0.95 * len(errors))] < 0.05
    assert 0.005 < fitted.error_p50 < 0.05


def test_no_coefficient_is_negative_whatever_the_steps() -> None:
    random_ = random.Random(3)
    noisy = [MeasuredStep(step.load, random_.uniform(1e-3, 1.0)) for step in steps()]
    fitted = fit(noisy, shape=SHAPE, chip="test", dtype="float32")
    assert min(fitted.theta) >= 0.0


def test_too_few_steps_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="too few"):
        fit(steps()[:10], shape=SHAPE, chip="test", dtype="float32")


def test_learning_starts_from_the_profile_and_follows_a_machine_that_has_changed() -> None:
    fitted = fit(steps(), shape=SHAPE, chip="test", dtype="float32")
    cost = OnlineCost(RooflineCost(shape=SHAPE, hardware=HARDWARE))
    cost.start_from(fitted)
    for step in steps(seed=1):
        assert predicted_s(cost, step.load) == pytest.approx(step.duration_s, rel=5e-3)
    for seed in range(2, 14):
        for step in steps(seed=seed):
            cost.observe(step.load, 1.5 * step.duration_s)
    errors = sorted(abs(1 - predicted_s(cost, s.load) / (1.5 * s.duration_s)) for s in steps(seed=1))
    assert errors[int(0.95 * len(errors))] < 0.05


def test_a_profile_of_another_model_is_refused() -> None:
    fitted = fit(steps(), shape=SHAPE, chip="test", dtype="float32")
    other = ModelShape(**{**{f: getattr(SHAPE, f) for f in SHAPE.__slots__}, "num_layers": 5, "name": "other"})
    setup = SchedulerSetup(
        config=SchedulerConfig(), shape=other, hardware=HARDWARE, layout=ParallelLayout(), num_blocks=10, block_size=16,
        profile=fitted,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="run `medha profile` again"):
        setup.build()
    assert SchedulerSetup.from_header(setup.header()) == setup


def equations(fitted: FittedCost, measured: list[MeasuredStep]) -> tuple[list[list[float]], list[float]]:
    """gram and moments of steps that each count by the inverse of their duration."""
    rows = [[value / s.duration_s for value in features_of(s.load, fitted.hinges_tokens)] for s in measured]
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(NUM_FEATURES)] for i in range(NUM_FEATURES)]
    return gram, [sum(row[i] for row in rows) for i in range(NUM_FEATURES)]


def errors_of(theta: tuple[float, ...], hinges: tuple[float, float], measured: list[MeasuredStep]) -> list[float]:
    return [
        abs(1.0 - sum(a * b for a, b in zip(features_of(s.load, hinges), theta)) / s.duration_s) for s in measured
    ]


def test_the_features_of_a_step_are_its_counts_and_what_lies_past_each_hinge() -> None:
    load = StepLoad()
    load.add_chunk(5, 3, 0.0)
    load.add_decodes(2, 40, 0.0)
    assert features_of(load, (2.0, 4.0)) == [1.0, 5, 3.0, 1.0, 3, 6 + 7 + 8, 8, 40]
    assert features_of(load, (5.0, 6.0))[2:4] == [0.0, 0.0]


def test_what_learning_goes_on_from_are_the_equations_of_the_measured_steps() -> None:
    gram, moments = equations(FITTED, NOISY)
    assert [list(row) for row in FITTED.gram] == [pytest.approx(row) for row in gram]
    assert list(FITTED.moments) == pytest.approx(moments)
    assert (FITTED.num_steps, FITTED.shape, FITTED.chip, FITTED.dtype) == (len(NOISY), SHAPE, "test", "float32")


@pytest.mark.parametrize("is_wild", [False, True])
def test_no_coefficient_could_be_changed_for_a_smaller_error(is_wild: bool) -> None:
    # The conditions of Kuhn and Tucker: no slope where a coefficient is positive, none downwards where it is 0.
    random_ = random.Random(3)
    measured = [MeasuredStep(step.load, random_.uniform(1e-3, 1.0)) for step in NOISY] if is_wild else NOISY
    fitted = fit(measured, shape=SHAPE, chip="test", dtype="float32")
    gram, moments = equations(fitted, measured)
    for i, value in enumerate(fitted.theta):
        gradient = sum(a * b for a, b in zip(gram[i], fitted.theta)) - moments[i]
        if value > 0.0:
            assert gradient == pytest.approx(0.0, abs=1e-4 * moments[i])
        else:
            assert gradient >= -1e-9 * moments[i]
    assert (0.0 in fitted.theta) == is_wild


def test_the_hinges_are_the_pair_with_the_smallest_squared_error() -> None:
    candidates = [4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0]
    best = sum(error**2 for error in errors_of(FITTED.theta, FITTED.hinges_tokens, NOISY))
    for pair in combinations(candidates, 2):
        gram, moments = equations(replace(FITTED, hinges_tokens=pair), NOISY)
        assert sum(error**2 for error in errors_of(tuple(_solve(gram, moments)), pair, NOISY)) >= best * (1 - 1e-9)
    low, high = FITTED.hinges_tokens
    assert low < high and {low, high} <= set(candidates)


def test_the_errors_stated_are_those_of_steps_that_a_fit_of_the_others_had_not_seen() -> None:
    errors = []
    for fold in range(5):
        seen = [step for index, step in enumerate(NOISY) if index % 5 != fold]
        theta = _solve(*equations(FITTED, seen))
        errors += errors_of(tuple(theta), FITTED.hinges_tokens, [s for i, s in enumerate(NOISY) if i % 5 == fold])
    errors.sort()
    assert FITTED.error_p50 == pytest.approx(errors[len(NOISY) // 2], rel=1e-6)
    assert FITTED.error_p95 == pytest.approx(errors[int(0.95 * len(NOISY))], rel=1e-6)


def test_fifteen_steps_are_enough_and_fourteen_are_not() -> None:
    assert fit(steps()[:15], shape=SHAPE, chip="test", dtype="float32").num_steps == 15
    with pytest.raises(AssertionError, match="^14 steps are too few for 8 coefficients"):
        fit(steps()[:14], shape=SHAPE, chip="test", dtype="float32")


def test_what_was_never_measured_costs_nothing() -> None:
    decodes = [step for step in steps() + steps(seed=4) if not step.load.chunk_context]
    fitted = fit(decodes, shape=SHAPE, chip="test", dtype="float32")
    assert fitted.theta[5:7] == (0.0, 0.0) and fitted.theta[7] == pytest.approx(5e-8, rel=1e-3)


NOISY = steps(noise=0.05)
FITTED = fit(NOISY, shape=SHAPE, chip="test", dtype="float32")
