"""The online cost model against the same equations written as loops, step by step, to the last bits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_medha.core.cost.fitted_cost import FittedCost, MeasuredStep, features_of, fit
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import RooflineCost, StepLoad
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

SHAPE = ModelShape(
    name="hand", num_layers=3, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=100, max_context_len=1 << 20,
)  # fmt: skip
HARDWARE = Hardware(
    name="hand", flops_per_s=2e9, memory_bytes_per_s=1e8, step_overhead_s=3e-3, layer_overhead_s=2e-4,
    chunk_overhead_s=5e-5, linear_efficiency=0.5, attention_efficiency=0.25, memory_efficiency=0.4,
)  # fmt: skip
ROOFLINE = RooflineCost(shape=SHAPE, hardware=HARDWARE)


class Loops:
    """Least squares on relative errors with coefficients >= 0, one sweep per step, and the pace on top."""

    def __init__(self, theta: list[float], start: list[float], hinges: tuple[float, float]) -> None:
        self.hinges = hinges
        self.theta = list(theta)
        weights = [(0.04 / (30.0 * max(value, 1e-30))) ** 2 for value in start]
        self.gram = [[weight if i == j else 0.0 for j in range(8)] for i, weight in enumerate(weights)]
        self.moments = [weight * value for weight, value in zip(weights, theta)]
        self.damping = [1e-3 * weight for weight in weights]
        self.usual_error, self.surprises = 0.5, 0.0
        self.raw_pace, self.benefit = 1.0, 0.0
        self.num_observed = self.revision = 0
        self.reference = self.predictions()

    @property
    def pace(self) -> float:
        return self.raw_pace if self.benefit > 0.0 else 1.0

    def predictions(self) -> list[float]:
        made = []
        for start, count, has_attention in ((0, 16, False), (0, 512, True), (32768, 64, True)):
            load = StepLoad()
            load.add_chunk(start, count, 0.0)
            terms = [a * b for a, b in zip(self.theta, features_of(load, self.hinges))]
            made.append(sum(terms if has_attention else terms[:5]))
        return made

    def observe(self, load: StepLoad, duration_s: float) -> None:
        features = [value / duration_s for value in features_of(load, self.hinges)]
        fitted = sum(a * b for a, b in zip(self.theta, features))
        error = abs(1.0 - fitted)
        kept = 0.999
        is_outlier = error > 4.0 * self.usual_error + 0.05
        self.usual_error += 0.02 * (min(error, 4.0 * self.usual_error) - self.usual_error)
        if is_outlier:
            self.surprises += 1.0
            if self.surprises > 2.5:
                self.surprises, kept = self.surprises - 1.0, 0.25
        else:
            self.surprises = max(0.0, self.surprises - 0.25)
        if load.chunk_context:
            gained = error - abs(1.0 - fitted * self.raw_pace)
            self.benefit += 0.02 * (gained - self.benefit)
            self.raw_pace += 0.5 * (min(max(1.0 / max(fitted, 1e-9), 0.5), 2.0) - self.raw_pace)
        for i in range(8):
            for j in range(8):
                self.gram[i][j] = kept * self.gram[i][j] + features[i] * features[j]
            self.moments[i] = kept * self.moments[i] + features[i]
            gradient = self.moments[i] - sum(a * b for a, b in zip(self.gram[i], self.theta))
            self.theta[i] = max(0.0, self.theta[i] + gradient / (self.gram[i][i] + self.damping[i]))
        self.theta[0] = max(self.theta[0], 1e-7)
        self.num_observed += 1
        if self.num_observed % 16 == 0:
            new = self.predictions()
            if any(abs(a - b) > 0.05 * b for a, b in zip(new, self.reference)):
                self.reference, self.revision = new, self.revision + 1

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        low, high = self.hinges
        features = [1.0, num_tokens, max(0.0, num_tokens - low), max(0.0, num_tokens - high), num_sequences]
        return self.pace * sum(a * b for a, b in zip(self.theta, features))

    def attention_s(self, start: int, num_tokens: int) -> float:
        pairs = sum(start + index + 1 for index in range(num_tokens))
        return self.pace * (self.theta[5] * pairs + self.theta[6] * (start + num_tokens))


def assert_same(cost: OnlineCost, loops: Loops) -> None:
    assert cost.theta == pytest.approx(loops.theta, rel=1e-6, abs=1e-18)
    assert cost.pace == pytest.approx(loops.pace, rel=1e-9)
    assert (cost.num_observed, cost.revision) == (loops.num_observed, loops.revision)
    low, high = (int(hinge) for hinge in loops.hinges)
    for num_tokens in (1, low, low + 1, high, high + 1, 4 * high):
        assert cost.linear_s(num_tokens, 2) == pytest.approx(loops.linear_s(num_tokens, 2), rel=1e-6)
    assert cost.attention_s(5, 3) == pytest.approx(loops.attention_s(5, 3), rel=1e-6, abs=1e-18)
    assert cost.decode_attention_s(77) == pytest.approx(77 * loops.pace * loops.theta[7], rel=1e-6, abs=1e-18)


def plain(shape: ModelShape = SHAPE, tp: int = 1) -> Loops:
    """What the roofline of HARDWARE says, term by term."""
    flops_per_s, bytes_per_s = 2e9 * 0.5, 1e8 * 0.4
    token_s = 2 * shape.num_layers * shape.num_active_layer_params / tp / flops_per_s
    read_s = shape.num_layers * shape.num_layer_params / tp * shape.bytes_per_element / bytes_per_s
    key_s = shape.kv_bytes_per_token / min(tp, shape.num_kv_heads) / bytes_per_s
    knee = max(4.0, read_s / token_s)
    first = 3e-3 + shape.num_layers * 2e-4 + read_s
    rest = [
        5e-5 + 2 * shape.num_head_params / tp / flops_per_s,
        4 * shape.head_dim * shape.num_heads * shape.num_layers / tp / (2e9 * 0.25),
        key_s,
        key_s,
    ]
    theta = [first, 0.3 * token_s, 0.4 * token_s, 0.3 * token_s, *rest]
    return Loops(theta, [first, token_s, token_s, token_s, *rest], (0.25 * knee, knee))


def load_of(draw: random.Random) -> StepLoad:
    load = StepLoad()
    if draw.random() < 0.7:
        load.add_chunk(draw.choice((0, 10, 500)), draw.choice((2, 9, 30, 64, 200)), 0.0)
    if not load.num_tokens or draw.random() < 0.5:
        count = draw.choice((1, 3, 8))
        load.add_decodes(count, count * draw.choice((10, 300)), 0.0)
    return load


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("experts", [1, 4])
def test_it_starts_from_the_roofline_term_by_term(tp: int, experts: int) -> None:
    shape = replace(SHAPE, num_experts=experts)
    cost = OnlineCost(RooflineCost(shape=shape, hardware=HARDWARE, layout=ParallelLayout(tp=tp)))
    assert_same(cost, plain(shape, tp))


def test_weights_that_cost_nothing_to_read_leave_a_knee_at_four_tokens() -> None:
    fast = replace(HARDWARE, memory_bytes_per_s=1e15)
    cost = OnlineCost(RooflineCost(shape=SHAPE, hardware=fast))
    slopes = [cost.linear_s(n + 1, 1) - cost.linear_s(n, 1) for n in (0, 2, 3, 4, 5)]
    token_s = 2 * SHAPE.num_layers * SHAPE.num_layer_params / 1e9
    assert slopes == pytest.approx([0.3 * token_s, 0.7 * token_s, 0.7 * token_s, token_s, token_s], rel=1e-6)


@pytest.mark.parametrize(
    "speeds",
    [
        pytest.param((1.0,) * 8, id="as believed"),
        pytest.param((3.0,) * 8, id="three times slower"),
        pytest.param((0.2,) * 8, id="five times faster"),
        pytest.param((1.0, 1.0, 1.7, 1.7, 0.8, 0.8, 1.0, 9.0), id="a pace that changes"),
    ],
)
def test_it_learns_from_every_step_what_loops_over_the_equations_learn(speeds: tuple[float, ...]) -> None:
    draw = random.Random(5)
    cost, loops = OnlineCost(ROOFLINE), plain()
    for index in range(200):
        load = load_of(draw)
        seconds = cost_of(load) * speeds[index // 5 % len(speeds)] * draw.uniform(0.97, 1.03)
        cost.observe(load, seconds)
        loops.observe(load, seconds)
        assert_same(cost, loops)
    assert loops.revision > 0 or set(speeds) == {1.0}


def cost_of(load: StepLoad) -> float:
    return (
        4e-3 + 1e-5 * load.num_tokens + 6e-5 * load.num_sequences + 4e-7 * load.chunk_pairs
        + 1e-6 * load.chunk_context + 3e-6 * load.decode_context
    )  # fmt: skip


def test_a_few_surprises_are_forgiven_and_more_of_them_make_it_forget() -> None:
    cost, loops = OnlineCost(ROOFLINE), plain()
    load = StepLoad()
    load.add_chunk(0, 64, 0.0)
    seconds = [cost_of(load)] * 40 + [10 * cost_of(load)] * 2 + [cost_of(load)] * 3 + [10 * cost_of(load)] * 6
    for each in seconds:
        cost.observe(load, each)
        loops.observe(load, each)
        assert_same(cost, loops)


def profile() -> FittedCost:
    draw = random.Random(2)
    loads = [load_of(draw) for _ in range(60)]
    return fit([MeasuredStep(load, cost_of(load)) for load in loads], shape=SHAPE, chip="hand", dtype="float32")


def test_from_a_profile_it_goes_on_as_if_its_steps_had_just_been_seen() -> None:
    fitted = profile()
    cost, loops = OnlineCost(ROOFLINE), plain()
    cost.start_from(fitted)
    loops.hinges, loops.theta = fitted.hinges_tokens, list(fitted.theta)
    weights = [row[i] for i, row in enumerate(loops.gram)]
    loops.gram = [[fitted.gram[i][j] + (weights[i] if i == j else 0.0) for j in range(8)] for i in range(8)]
    loops.moments = [fitted.moments[i] + weights[i] * fitted.theta[i] for i in range(8)]
    loops.usual_error, loops.revision, loops.reference = 0.04, 1, loops.predictions()
    assert fitted.error_p50 < 0.04, "a profile that fits better than machines are quiet"
    assert_same(cost, loops)
    draw = random.Random(7)
    for index in range(48):
        load = load_of(draw)
        seconds = cost_of(load) * (1.3 if index > 20 else 1.0)
        cost.observe(load, seconds)
        loops.observe(load, seconds)
        assert_same(cost, loops)


def test_the_error_that_a_profile_states_is_what_it_is_used_to() -> None:
    cost, loops = OnlineCost(ROOFLINE), plain()
    fitted = replace(profile(), error_p50=0.3)
    cost.start_from(fitted)
    assert cost._usual_error == 0.3 != loops.usual_error


def test_a_profile_comes_before_the_first_step() -> None:
    cost = OnlineCost(ROOFLINE)
    cost.observe(load_of(random.Random(0)), 1.0)
    with pytest.raises(AssertionError, match="^a profile is where learning starts"):
        cost.start_from(profile())
