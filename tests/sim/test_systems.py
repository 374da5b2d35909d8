"""Systems that are not our scheduler: what LoongServe's and static context parallelism's rules promise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.batch import Batch
from megatron_medha.core.cost.hardware import Hardware, Link
from megatron_medha.core.cost.step_cost import RooflineCost
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import SchedulerProtocol
from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.dispatch import InstanceUsage, PromptDispatcher
from megatron_medha.sim.baselines.elastic import ElasticSystem, Filling
from megatron_medha.sim.baselines.instances_world import InstancesSimRuntime, PredictedTruth
from megatron_medha.sim.baselines.partition import partition
from megatron_medha.sim.baselines.pools import ReservedPools
from megatron_medha.sim.baselines.ring_cost import RingCost
from megatron_medha.sim.baselines.static import StaticSystem
from megatron_medha.sim.ledger import Ledger
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary import LengthClasses, Summary
from megatron_medha.workload.request_feed import OpenLoop

SHAPE = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 24,
)  # fmt: skip
A100 = Hardware(
    name="a100", flops_per_s=312e12, memory_bytes_per_s=2.039e12, num_devices=16, devices_per_node=8,
    intra_node=Link(bytes_per_s=1.28e11, latency_s=3.5e-5), inter_node=Link(bytes_per_s=7.6e9, latency_s=4e-5),
)  # fmt: skip
COST = RingCost(
    instance=RooflineCost(shape=SHAPE, hardware=A100, layout=ParallelLayout(tp=2)), shape=SHAPE, hardware=A100, tp=2
)
TOKENS = 900_000
ALL = tuple(range(8))


def elastic(filling: Filling = Filling.IDLE, tokens: int = TOKENS) -> SchedulerProtocol:
    return ElasticSystem(ALL, tokens, COST, count(), filling)


def static(tokens: int = TOKENS) -> SchedulerProtocol:
    return StaticSystem(ALL, tokens, COST, count())


def reserved(tokens: int = TOKENS) -> SchedulerProtocol:
    ids = count()
    short, long = (ElasticSystem(part, tokens, COST, ids) for part in (ALL[:2], ALL[2:]))
    return ReservedPools(short, long, 8191)


SYSTEMS: dict[str, Callable[[int], SchedulerProtocol]] = {
    "blocking": lambda tokens: elastic(Filling.NONE, tokens),
    "idle": lambda tokens: elastic(Filling.IDLE, tokens),
    "eager": lambda tokens: elastic(Filling.EAGER, tokens),
    "static": static,
    "reserved": reserved,
}


class Kept:
    """An observer that keeps all batches, with their moments."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, Batch]] = []

    def handled(self, *_: object) -> None: ...

    def scheduled(self, batch: Batch, now_s: float) -> None:
        self.batches.append((now_s, batch))


def run(system: SchedulerProtocol, *requests: Request) -> tuple[dict[str, RequestStats], list[tuple[float, Batch]]]:
    outcomes: list[RequestStats] = []
    ledger = Ledger(Summary(LengthClasses(), Slo()), Slo(), lambda num_tokens: 1.0, outcomes.append)
    kept = Kept()
    serve(system, InstancesSimRuntime(OpenLoop(requests), Pipeline(1, 16), PredictedTruth(), ledger), (kept,))
    ledger.close()
    return {outcome.request.request_id: outcome for outcome in outcomes}, kept.batches


def request(name: str, num_tokens: int, at_s: float = 0.0, num_out: int = 2) -> Request:
    return Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=at_s)


def ttft_s(outcome: RequestStats) -> float:
    assert outcome.ttft_s is not None
    return outcome.ttft_s


# ---- cost ----


def test_a_ring_of_one_instance_costs_what_the_instance_does() -> None:
    alone_s = COST.instance.linear_s(5000, 1) + COST.instance.attention_s(0, 5000)
    assert COST.prefill_s(1, 5000, 5000.0**2, 1) == pytest.approx(alone_s)


def test_a_long_prompt_is_nearly_eight_times_as_fast_on_eight_instances() -> None:
    one_s, eight_s = (COST.prefill_s(degree, 1_000_000, 1e12, 1) for degree in (1, 8))
    assert 7.5 < one_s / eight_s <= 8.0


def test_a_short_prompt_gains_nothing_from_a_ring_across_nodes() -> None:
    assert COST.prefill_s(8, 1000, 1e6, 1) > COST.prefill_s(4, 1000, 1e6, 1)


# ---- partition ----


def normalised(shares: list[tuple[int, int, float]], lengths: list[int]) -> float:
    return sum(seconds / lengths[i] for first, num, seconds in shares for i in range(first, first + num))


@given(
    st.lists(st.integers(1, 400_000), min_size=1, max_size=4).map(lambda lengths: sorted(lengths, reverse=True)),
    st.lists(st.integers(100_000, 900_000), min_size=1, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_a_partition_serves_every_prompt_once_where_it_fits_and_none_is_better(
    lengths: list[int], room: list[int]
) -> None:
    shares = partition(COST, lengths, room)
    # By hand: every way to cut the prompts into runs, and to give each run the instances from one place to another.
    best = float("inf")
    for cuts in product((False, True), repeat=len(lengths) - 1):
        ends = [i + 1 for i, is_cut in enumerate(cuts) if is_cut] + [len(lengths)]
        runs = list(zip([0, *ends[:-1]], ends, strict=True))
        for places in product(range(len(room) + 1), repeat=len(runs) + 1):
            if list(places) != sorted(places) or len(set(places)) != len(places):
                continue
            total = 0.0
            for (first, end), low, high in zip(runs, places, places[1:], strict=False):
                part = lengths[first:end]
                fits = sum(part) <= sum(room[low:high])
                seconds = COST.prefill_s(high - low, sum(part), sum(float(n) ** 2 for n in part), len(part))
                total += sum(seconds / n for n in part) if fits else float("inf")
            best = min(best, total)
    if not shares:
        assert best == float("inf")
        return
    assert sorted(i for s in shares for i in range(s.first_prompt, s.first_prompt + s.num_prompts)) == list(
        range(len(lengths))
    )
    used = [i for s in shares for i in range(s.first_instance, s.first_instance + s.num_instances)]
    assert len(used) == len(set(used)) and all(i in range(len(room)) for i in used)
    assert normalised([(s.first_prompt, s.num_prompts, s.prefill_s) for s in shares], lengths) == pytest.approx(best)


# ---- systems ----

REQUESTS = st.lists(
    st.tuples(st.sampled_from([1, 50, 3000, 8000, 120_000, 300_000]), st.integers(1, 40), st.floats(0.0, 20.0)),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("name", SYSTEMS)
@given(drawn=REQUESTS, tokens=st.sampled_from([60_000, 900_000]))
@settings(max_examples=10, deadline=None)
def test_every_request_that_fits_gets_all_its_tokens_and_each_prompt_runs_once_and_whole(
    name: str, drawn: list[tuple[int, int, float]], tokens: int
) -> None:
    requests = sorted(
        (request(f"r{i}", num, at_s, num_out) for i, (num, num_out, at_s) in enumerate(drawn)),
        key=lambda one: one.arrival_s,
    )
    outcomes, batches = run(SYSTEMS[name](tokens), *requests)
    for one in requests:
        num_instances = 8 if name != "reserved" else 2 if one.num_prompt_tokens < 8192 else 6
        if one.num_prompt_tokens + one.max_output_tokens > num_instances * tokens:
            assert outcomes[one.request_id].ending is Ending.REJECTED
            continue
        assert outcomes[one.request_id].ending is Ending.FINISHED
        assert outcomes[one.request_id].num_tokens_out == one.max_output_tokens
        chunks = [chunk for _, batch in batches for chunk in batch.chunks if chunk.request_id == one.request_id]
        assert (chunks[0].start, chunks[0].num_tokens) == (0, one.num_prompt_tokens)  # never cut, never preempted
        assert [chunk.start for chunk in chunks[1:]] == list(
            range(one.num_prompt_tokens, one.num_prompt_tokens + one.max_output_tokens - 1)
        )


def beside_a_long_prompt(system: SchedulerProtocol) -> tuple[float, float]:
    """TTFT of a short prompt that comes just after a long one, and of the long one."""
    outcomes, _ = run(
        system,
        request("first", 2000, num_out=300), request("long", 900_000, 0.5), request("short", 2000, 1.5)
    )  # fmt: skip
    return ttft_s(outcomes["short"]), ttft_s(outcomes["long"])


def test_where_nothing_runs_beside_a_prefill_a_short_prompt_waits_for_all_of_a_long_one() -> None:
    short_s, long_s = beside_a_long_prompt(elastic(Filling.NONE))
    assert short_s > 0.9 * long_s > 30.0
    short_s, long_s = beside_a_long_prompt(static())
    assert short_s > 0.9 * long_s > 30.0


def test_idle_instances_take_short_prompts_beside_a_long_one() -> None:
    short_s, long_s = beside_a_long_prompt(elastic(Filling.IDLE))
    assert short_s < 0.2 * long_s


def test_decoding_instances_take_them_sooner() -> None:
    (idle_s, _), (eager_s, _) = (beside_a_long_prompt(elastic(f)) for f in (Filling.IDLE, Filling.EAGER))
    assert eager_s < 0.5 * idle_s


def test_a_reserved_pool_keeps_short_prompts_from_long_ones_which_are_slower_for_it() -> None:
    short_s, long_s = beside_a_long_prompt(reserved())
    _, open_long_s = beside_a_long_prompt(elastic())
    assert short_s < 0.5
    assert long_s > 1.1 * open_long_s


def test_kv_is_left_on_as_few_instances_as_hold_it() -> None:
    _, batches = run(elastic(), request("long", 400_000, num_out=5))
    assert len(batches[0][1].chunks[0].kvp_ranks) == 8
    assert all(len(batch.chunks[0].kvp_ranks) == 1 for _, batch in batches[1:])


def test_a_long_prompt_that_others_have_passed_ten_times_is_passed_no_more() -> None:
    # Decodes hold seven of eight instances, and running the long one on the eighth would be far slower than on all.
    usage = InstanceUsage(num_used_tokens=750_000, num_promised_tokens=0, num_sequences=1, output_counts=[600])
    dispatcher = PromptDispatcher(COST, 8, 110_000)
    waiting = deque([request("long", 100_000)])
    begun = []
    for index in range(15):
        waiting.append(request(f"s{index}", 2000))
        begun += [one.request_id for one in dispatcher.choose(waiting, usage)]
    assert begun == [f"s{index}" for index in range(10)]
    assert waiting[0].request_id == "long"


def test_static_context_parallelism_batches_short_prompts_up_to_its_time_limit() -> None:
    _, batches = run(static(), *(request(f"r{i}", 4000) for i in range(200)))
    sizes = [len(batch.chunks) for _, batch in batches if batch.chunks[0].start == 0]
    assert 1 < max(sizes) < 200
    assert all(batch.predicted_s <= 0.5 for _, batch in batches if batch.chunks[0].start == 0)
