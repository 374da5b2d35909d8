"""In overload too every admitted request has a wait bound, under every policy, and progress_share is what gives it.

The bound. Let p be progress_share and B the step budget. Once a prefill X with deadline D is the one that has been
overdue longest and owns KV, every step of at most B seconds saves p * B for it, and what it has saved buys its chunks,
each worth at least B / 2. So X is through after (W + B / 2) / p seconds of steps, W being its prefill cut into chunks
worth half a step. Before X come at most the prefills with deadlines before D; there are none but those that arrived
before D, and with S their work they take S / p at most. So X has its first token by D + (S + W + B / 2) / p + B.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Arrived, Event, Output, TokenOut
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import PrefillTimes
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.sim.held_batches import InterruptiblePipeline

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=100_000,
)  # fmt: skip
COST = RooflineCost(
    shape=SHAPE, hardware=Hardware(name="slow", flops_per_s=1e9, memory_bytes_per_s=1e10, step_overhead_s=2e-3)
)
BUDGET_S = 0.05


class EndlessShorts(RecordingSimRuntime):
    """One long request at 0 s, and short ones at a fixed pace for ever; it ends when the long one has its token."""

    def __init__(self, long: Request, every_s: float, num_tokens: int, num_out: int, until_s: float) -> None:
        self._shorts = self._endless(every_s, num_tokens, num_out)
        self._long, self._until_s = long, until_s
        super().__init__([long], true_step_s(COST))
        self._bring_next()

    @staticmethod
    def _endless(every_s: float, num_tokens: int, num_out: int) -> Iterator[Request]:
        index = 0
        while True:
            index += 1
            yield Request(
                request_id=f"short-{index}",
                num_prompt_tokens=num_tokens,
                max_output_tokens=num_out,
                arrival_s=index * every_s,
            )

    def _bring_next(self) -> None:
        request = next(self._shorts)
        self.push(request.arrival_s, Arrived(request))

    def next_event(self) -> Event | None:
        event = super().next_event()
        if isinstance(event, Arrived) and event.request is not self._long:
            self._bring_next()
        is_over = self.now_s() > self._until_s or bool(self.records["long"].token_times_s)
        return None if is_over else event

    def emit(self, output: Output) -> None:
        if isinstance(output, TokenOut) and output.request_id == "long":
            self.records["long"].token_times_s.append(self.now_s())


def long_ttft_s(config: SchedulerConfig, memory: KVMemory, world: EndlessShorts) -> float | None:
    serve(Scheduler(config, COST, memory), world)
    times_s = world.records["long"].token_times_s
    return times_s[0] if times_s else None


NUM_LONG, NUM_SHORT = 3_000, 100
LONG = Request(request_id="long", num_prompt_tokens=NUM_LONG, max_output_tokens=1, arrival_s=0.0)


def bound_s(config: SchedulerConfig, every_s: float) -> float:
    times = PrefillTimes(config.chunk_rule, COST, BUDGET_S, SHAPE.max_context_len)
    halves = PrefillTimes(config.chunk_rule, COST, BUDGET_S / 2, SHAPE.max_context_len)
    deadline_s = config.deadline_multiplier * times.prefill_s(NUM_LONG)
    earlier_s = deadline_s / every_s * halves.prefill_s(NUM_SHORT)
    share = config.progress_share
    return deadline_s + (earlier_s + halves.prefill_s(NUM_LONG) + BUDGET_S / 2) / share + BUDGET_S


def overloaded(config: SchedulerConfig, until_s: float, every_s: float) -> float | None:
    memory = KVMemory(num_blocks=20_000, block_size=4, max_context_len=SHAPE.max_context_len)
    world = EndlessShorts(LONG, every_s, NUM_SHORT, 1, until_s)
    return long_ttft_s(config, memory, world)


# Shorts alone ask for 1.2 times what the machine can do.
EVERY_S = (COST.linear_s(NUM_SHORT, 1) - COST.linear_s(0, 0) + COST.attention_s(0, NUM_SHORT)) / 1.2


@pytest.mark.parametrize("policy", ["lars", "srpt", "edf", "lrs", "sjf", "fcfs", "hrrn"])
def test_a_long_prefill_under_endless_shorts_ends_within_the_bound_of_its_progress_share(policy: str) -> None:
    config = SchedulerConfig(policy=policy, step_budget_s=BUDGET_S, progress_share=0.1)
    limit_s = bound_s(config, EVERY_S)
    ttft_s = overloaded(config, 2 * limit_s, EVERY_S)
    assert ttft_s is not None and ttft_s <= limit_s


def test_without_a_progress_share_srpt_starves_a_long_prefill() -> None:
    limit_s = bound_s(SchedulerConfig(step_budget_s=BUDGET_S, progress_share=0.1), EVERY_S)
    config = SchedulerConfig(policy="srpt", step_budget_s=BUDGET_S, progress_share=0.0)
    assert overloaded(config, limit_s, EVERY_S) is None


def test_a_larger_progress_share_ends_a_long_prefill_sooner() -> None:
    ttfts_s = []
    for share in (0.1, 0.3):
        config = SchedulerConfig(policy="srpt", step_budget_s=BUDGET_S, progress_share=share)
        ttfts_s.append(overloaded(config, 1000.0, EVERY_S))
    assert ttfts_s[0] is not None and ttfts_s[1] is not None and ttfts_s[1] < 0.6 * ttfts_s[0]


def test_the_progress_share_of_a_lower_class_is_its_own_too() -> None:
    # Class 1 never runs by policy while class 0 overloads the machine.
    config = SchedulerConfig(policy="fcfs", step_budget_s=BUDGET_S, progress_share=0.1)
    memory = KVMemory(num_blocks=20_000, block_size=4, max_context_len=SHAPE.max_context_len)
    low = Request(request_id="long", num_prompt_tokens=NUM_LONG, max_output_tokens=1, arrival_s=0.0, priority=1)
    limit_s = bound_s(config, EVERY_S)
    ttft_s = long_ttft_s(config, memory, EndlessShorts(low, EVERY_S, NUM_SHORT, 1, 2 * limit_s))
    assert ttft_s is not None and ttft_s <= limit_s


DRAWN = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 150), st.integers(1, 3000)),  # prompt tokens
        st.integers(1, 4),                                     # output tokens
        st.floats(0.0, 4.0),                                   # arrival
        st.integers(0, 2),                                     # priority class
        st.one_of(st.none(), st.floats(0.05, 5.0)),            # a deadline of its own, however impossible
    ),
    min_size=1,
    max_size=40,
)


@given(
    drawn=DRAWN,
    policy=st.sampled_from(sorted(POLICIES)),
    share=st.floats(0.1, 0.9),
    is_preemptive=st.booleans(),
    has_space_sharing=st.booleans(),
    has_triage=st.booleans(),
    spp=st.sampled_from((1, 2)),
    interruptible=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_request_of_a_random_burst_has_its_first_token_within_the_bound(
    drawn: list[tuple[int, int, float, int, float | None]],
    policy: str,
    share: float,
    is_preemptive: bool,
    has_space_sharing: bool,
    has_triage: bool,
    spp: int,
    interruptible: bool,
) -> None:
    config = SchedulerConfig(
        policy=policy, step_budget_s=BUDGET_S, progress_share=share, is_preemptive=is_preemptive,
        has_space_sharing=has_space_sharing, has_triage=has_triage, min_deadline_s=0.05, interruptible=interruptible,
    )  # fmt: skip
    requests = [
        Request(
            request_id=f"r{i}", num_prompt_tokens=num, max_output_tokens=num_out, arrival_s=at_s, priority=level,
            ttft_slo_s=slo_s,
        )
        for i, (num, num_out, at_s, level, slo_s) in enumerate(drawn)
    ]  # fmt: skip
    memory = KVMemory(num_blocks=100_000, block_size=4, max_context_len=SHAPE.max_context_len)
    pipeline = InterruptiblePipeline(spp, 1, None, (1,) * spp, lambda num_tokens: 1e-4) if interruptible else None
    world = RecordingSimRuntime(requests, true_step_s(COST), spp, pipeline=pipeline)
    scheduler = Scheduler(config, COST, memory, spp)
    world.wakes_at_s = scheduler.wakes_at_s
    serve(scheduler, world)
    for request, limit_s in bounds_s(config, requests, spp):
        assert world.records[request.request_id].token_times_s[0] <= limit_s


def bounds_s(config: SchedulerConfig, requests: list[Request], spp: int) -> Iterator[tuple[Request, float]]:
    """Each request, and the moment by which its first token is promised (core/scheduling/prefill_packer.py)."""
    times = PrefillTimes(config.chunk_rule, COST, BUDGET_S, SHAPE.max_context_len)
    halves = PrefillTimes(config.chunk_rule, COST, BUDGET_S / 2, SHAPE.max_context_len)
    due = sorted(
        (
            request.arrival_s
            + (
                request.ttft_slo_s
                or max(
                    config.deadline_multiplier * times.prefill_s(request.num_prompt_tokens) / spp,
                    config.min_deadline_s,
                )
            ),
            request.arrival_s,
            request.request_id,
            request,
        )
        for request in requests
    )
    earlier_s = 0.0
    if config.interruptible:  # a step of another's that is being held, perhaps, when the deadline passes
        earlier_s = max(halves.prefill_s(request.num_prompt_tokens) for request in requests)
    for count, (deadline_s, _, _, request) in enumerate(due):
        earlier_s += halves.prefill_s(request.num_prompt_tokens)
        yield request, deadline_s + (earlier_s + BUDGET_S / 2) / config.progress_share + (count + 2) * BUDGET_S


def short_of_memory(progress_share: float, until_s: float) -> float | None:
    """The long one needs 90% of the memory, which the decodes of short ones always fill; time is no problem."""
    config = SchedulerConfig(policy="srpt", step_budget_s=BUDGET_S, progress_share=progress_share, watermark=0.0)
    memory = KVMemory(num_blocks=800, block_size=4, max_context_len=SHAPE.max_context_len)
    long = Request(request_id="long", num_prompt_tokens=2880, max_output_tokens=1, arrival_s=0.1)
    # Each holds 30 to 42 blocks for about 50 steps, and 40 new ones come in that time.
    return long_ttft_s(config, memory, EndlessShorts(long, 0.05, 120, 50, until_s))


@pytest.mark.parametrize("progress_share", [0.1, 0.5])
def test_a_request_that_needs_most_of_the_memory_is_not_starved_by_short_ones(progress_share: float) -> None:
    # Overdue after 1.5 times its prefill; then 720 blocks are kept from what is freed, 0.1 of it at the least.
    ttft_s = short_of_memory(progress_share, 200.0)
    assert ttft_s is not None and ttft_s < 100.0


def test_without_a_progress_share_short_requests_keep_the_memory_for_ever() -> None:
    assert short_of_memory(0.0, 100.0) is None
