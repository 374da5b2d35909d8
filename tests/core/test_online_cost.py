"""The cost model finds out what machine it runs on, from the steps alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Arrived, Batch, Event, Output, TokenOut
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost, StepLoad
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

LLAMA3_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
TINY = ModelShape(
    name="tiny", num_layers=4, hidden_size=256, ffn_hidden_size=768, num_heads=8, num_kv_heads=2, head_dim=32,
    vocab_size=512, max_context_len=1 << 16, bytes_per_element=4,
)  # fmt: skip
H100 = Hardware(name="h100", flops_per_s=989e12, memory_bytes_per_s=3.35e12)
CPU = Hardware(
    name="cpu", flops_per_s=1e11, memory_bytes_per_s=2e10, step_overhead_s=2e-3, layer_overhead_s=1e-4,
    chunk_overhead_s=5e-5,
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a step takes in truth; the fitted form need not be able to say it exactly."""

    linear_s: Callable[[int, int], float]
    attention_s: Callable[[int, int], float]
    decode_attention_s: Callable[[int], float]


def times(cost: RooflineCost, factor: float) -> Machine:
    return Machine(
        lambda num_tokens, num_sequences: factor * cost.linear_s(num_tokens, num_sequences),
        lambda start, num_tokens: factor * cost.attention_s(start, num_tokens),
        lambda context: factor * cost.decode_attention_s(context),
    )


def smooth(cost: RooflineCost) -> Machine:
    """No sharp knee between weights and FLOPs, and attention that is inefficient in small chunks."""
    fixed_s = cost.hardware.step_overhead_s

    def linear_s(num_tokens: int, num_sequences: int) -> float:
        full_s = cost.linear_s(num_tokens, num_sequences) - fixed_s
        weights_s = cost.linear_s(1, num_sequences) - fixed_s
        return fixed_s + (full_s**3 + (0.7 * weights_s) ** 3) ** (1 / 3)

    return Machine(
        linear_s,
        lambda start, num_tokens: cost.attention_s(start, num_tokens) * (1.0 + 16.0 / num_tokens),
        lambda context: 1.4 * cost.decode_attention_s(context),
    )


def additive(cost: RooflineCost) -> Machine:
    """A CPU that never waits for weights, twice as slow in attention and three times in decodes."""
    per_token = 2 * cost.shape.num_layers * cost.shape.num_layer_params / cost.hardware.flops_per_s / 0.4
    return Machine(
        lambda num_tokens, num_sequences: 3e-3 + per_token * num_tokens + 1e-4 * num_sequences,
        lambda start, num_tokens: 2 * cost.attention_s(start, num_tokens),
        lambda context: 3 * cost.decode_attention_s(context),
    )


GPU_ROOFLINE = RooflineCost(shape=LLAMA3_8B, hardware=H100)
CPU_ROOFLINE = RooflineCost(shape=TINY, hardware=CPU)
OTHER_GPU = RooflineCost(
    shape=LLAMA3_8B,
    hardware=replace(
        H100, linear_efficiency=0.4, attention_efficiency=0.25, memory_efficiency=0.6, step_overhead_s=6e-3
    ),
)
MACHINES = {
    "as the roofline says": (GPU_ROOFLINE, times(GPU_ROOFLINE, 1.0)),
    "10 times slower": (GPU_ROOFLINE, times(GPU_ROOFLINE, 10.0)),
    "10 times faster": (GPU_ROOFLINE, times(GPU_ROOFLINE, 0.1)),
    "other efficiencies": (GPU_ROOFLINE, times(OTHER_GPU, 1.0)),
    "smooth": (GPU_ROOFLINE, smooth(GPU_ROOFLINE)),
    "a cpu": (CPU_ROOFLINE, additive(CPU_ROOFLINE)),
    "a cpu 10 times faster": (CPU_ROOFLINE, times(CPU_ROOFLINE, 0.1)),
}


def prompts(shape: ModelShape, draw: random.Random) -> Iterator[Request]:
    """Chats of up to 8,000 tokens and one document in twenty, for ever."""
    index = 0
    while True:
        low, high = 20, min(8_000, shape.max_context_len // 8)
        if draw.random() < 0.05:
            low, high = shape.max_context_len // 32, shape.max_context_len // 2
        yield Request(
            request_id=str(index),
            num_prompt_tokens=int(low * (high / low) ** draw.random()),
            max_output_tokens=draw.randint(2, 300),
            arrival_s=0.0,
        )
        index += 1


class ClosedWorld(RecordingSimRuntime):
    """A new request comes whenever one ends, until so many steps have been made."""

    def __init__(self, shape: ModelShape, truth: Callable[[Batch], float], num_steps: int) -> None:
        self._prompts = prompts(shape, random.Random(1))
        self._num_steps_left = num_steps
        super().__init__([next(self._prompts) for _ in range(80)], truth)

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        self._num_steps_left -= 1

    def next_event(self) -> Event | None:
        return super().next_event() if self._num_steps_left else None

    def emit(self, output: Output) -> None:
        if isinstance(output, TokenOut) and output.finish_reason is not None:
            self.push(self.now_s(), Arrived(replace(next(self._prompts), arrival_s=self.now_s())))


def errors_of(
    prior: RooflineCost, machine: Machine, num_steps: int, slow_down: Callable[[int], float] = lambda step: 1.0
) -> tuple[OnlineCost, list[float]]:
    """Relative errors of the predictions of a real scheduler's steps, against the truth without its noise.

    The cost model sees durations with 3% noise, and one step in a hundred that took five times as long.
    """
    cost, draw, errors = OnlineCost(prior), random.Random(0), []
    exact = true_step_s(machine)  # type: ignore[arg-type]

    def duration_s(batch: Batch) -> float:
        seconds = exact(batch) * slow_down(len(errors))
        errors.append(abs(batch.predicted_s / seconds - 1.0))
        return seconds * (1.0 + draw.gauss(0.0, 0.03)) * (5.0 if draw.random() < 0.01 else 1.0)

    memory = KVMemory(num_blocks=200_000, block_size=16, max_context_len=prior.shape.max_context_len)
    # Without triage, under which the deep contexts that the model has not seen yet come later than by step 500.
    scheduler = Scheduler(SchedulerConfig(max_num_sequences=48, has_triage=False), cost, memory)
    serve(scheduler, ClosedWorld(prior.shape, duration_s, num_steps))
    return cost, errors


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


@pytest.mark.parametrize("name", MACHINES)
def test_after_500_steps_without_a_profile_95_of_100_predictions_are_within_5_percent(name: str) -> None:
    _, errors = errors_of(*MACHINES[name], num_steps=900)
    assert quantile(errors[500:], 0.95) <= 0.05


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_it_follows_a_machine_that_changes_its_speed_within_100_steps(factor: float) -> None:
    _, errors = errors_of(*MACHINES["smooth"], 800, lambda step: factor if step > 500 else 1.0)
    assert quantile(errors[600:], 0.9) <= 0.1


@pytest.mark.parametrize("name", ["10 times faster", "a cpu"])
def test_predictions_never_fall_as_work_grows(name: str) -> None:
    cost, _ = errors_of(*MACHINES[name], num_steps=300)
    tokens = [1, 2, 5, 17, 60, 130, 270, 500, 1100, 8192]
    linear = [cost.linear_s(num, 1) for num in tokens]
    assert linear == sorted(linear) and linear[0] > 0.0
    assert cost.linear_s(10, 2) >= cost.linear_s(10, 1)
    chunks = [cost.attention_s(1000, num) for num in tokens]
    assert chunks == sorted(chunks)
    starts = [cost.attention_s(start, 32) for start in (0, 100, 10**4, 10**6)]
    assert starts == sorted(starts)
    assert cost.decode_attention_s(100) <= cost.decode_attention_s(10**6)


def test_before_the_first_step_it_says_about_what_the_roofline_says() -> None:
    cost = OnlineCost(GPU_ROOFLINE)
    for num_tokens in (1, 512, 4096):
        assert cost.linear_s(num_tokens, 1) == pytest.approx(GPU_ROOFLINE.linear_s(num_tokens, 1), rel=0.5)
    assert cost.attention_s(10**5, 512) == pytest.approx(GPU_ROOFLINE.attention_s(10**5, 512), rel=0.2)


def test_the_revision_changes_when_predictions_do_and_rests_when_they_do() -> None:
    cost, load = OnlineCost(CPU_ROOFLINE), StepLoad()
    load.add_chunk(0, 512, 0.0)
    for _ in range(64):
        cost.observe(load, 10 * CPU_ROOFLINE.linear_s(512, 1))
    revised = cost.revision
    assert revised > 0
    for _ in range(200):
        cost.observe(load, 10 * CPU_ROOFLINE.linear_s(512, 1))
    assert cost.revision <= revised + 1


@pytest.mark.parametrize("duration_s", [0.0, -1.0])
def test_a_step_without_a_duration_teaches_nothing(duration_s: float) -> None:
    cost, load = OnlineCost(CPU_ROOFLINE), StepLoad()
    load.add_chunk(0, 512, 0.0)
    theta = list(cost.theta)
    cost.observe(load, duration_s)
    assert cost.theta == theta and cost.num_observed == 0
