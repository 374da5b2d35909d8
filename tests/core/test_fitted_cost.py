"""The fit finds the law that made the steps, and learning goes on from it."""

from __future__ import annotations

import random

import pytest

from megatron_medha.core.cost.fitted_cost import FittedCost, MeasuredStep, fit
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


def predicted_s(cost: FittedCost | OnlineCost, load: StepLoad) -> float:
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
        assert predicted_s(fitted, step.load) == pytest.approx(step.duration_s, rel=5e-3)


def test_noise_of_five_percent_costs_no_more_than_that_and_is_stated() -> None:
    fitted = fit(steps(noise=0.05), shape=SHAPE, chip="test", dtype="float32")
    errors = sorted(abs(1 - predicted_s(fitted, s.load) / s.duration_s) for s in steps(seed=1))
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
