"""Space sharing and the progress share to the token, on a machine where a token takes a second and all else nothing."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_bench import Bench, request

from megatron_medha.core.batch import Aborted, Batch
from megatron_medha.core.cost.step_cost import CostModel, StepLoad

BUDGET_S = 64.0


class SecondPerToken(CostModel):
    """Exact in binary, so that what fits to the last token does."""

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        return float(num_tokens)

    def attention_s(self, start: int, num_tokens: int) -> float:
        return 0.0

    def decode_attention_s(self, context: int) -> float:
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None: ...

    @property
    def revision(self) -> int:
        return 0


def bench_of(**more: Any) -> Bench:
    options = {
        "num_blocks": 50_000, "policy": "fcfs", "step_budget_s": BUDGET_S, "tile_tokens": 1, "max_relative_slack": 0.25,
        "progress_share": 0.0, "has_triage": False,
    }  # fmt: skip
    return Bench(cost=SecondPerToken(), **{**options, **more})


def tokens_of(batch: Batch) -> dict[str, int]:
    return {chunk.request_id: chunk.num_tokens for chunk in batch.chunks}


def lone_tokens(bench: Bench, *names: str) -> list[int]:
    """Of the next step, by request."""
    tokens = tokens_of(bench.step()[0])
    return [tokens.get(name, 0) for name in names]


@pytest.mark.parametrize("saved_steps", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("slack", [0.125, 0.25, 7.0])
def test_a_long_prefill_gives_what_it_has_saved_and_its_slack_allows_and_no_more(
    saved_steps: float, slack: float
) -> None:
    bench = bench_of(max_banked_steps=saved_steps)
    bench.arrive(request("long", num_tokens=100_000, num_out=1, ttft_slo_s=100_000 * (1 + slack) + BUDGET_S))
    given_s = min(slack, 0.25) * BUDGET_S
    most_s = saved_steps * BUDGET_S
    saved_s = most_s
    for index, wanted in enumerate([0, 0, 40, 0, 64, 64, 5, 0, 0, 0, 64, 1, 64, 64, 64]):
        if wanted:
            bench.arrive(request("short", num_tokens=wanted, num_out=1, at_s=bench.now_s))
        saved_s = min(saved_s + given_s, max(most_s, given_s))
        # It takes back what nobody takes; a prompt that would not end in the step does not join.
        kept = 64 if not wanted else 0 if saved_s >= BUDGET_S else max(1, int(64 - max(saved_s, 0.0)))
        shared = wanted if wanted <= 64 - kept else 0
        if index:  # the first step is full of the first chunk either way
            assert lone_tokens(bench, "long", "short") == [64 - shared, shared], f"step {index}"
        else:
            assert lone_tokens(bench, "long", "short") == [64, 0]
        saved_s -= shared
        if bench.scheduler.sequence("short") is not None:
            bench.handle(Aborted("short"))


def test_a_long_prefill_without_slack_gives_nothing() -> None:
    bench = bench_of()
    bench.arrive(request("long", num_tokens=1000, num_out=1, ttft_slo_s=900.0))
    bench.arrive(request("short", num_tokens=1, num_out=1, at_s=0.0))
    assert lone_tokens(bench, "long", "short") == [64, 0]


def test_where_no_long_prefill_runs_the_savings_are_full_again() -> None:
    bench = bench_of(max_banked_steps=1.0)
    slow = {"num_out": 1, "ttft_slo_s": 1e6}
    bench.arrive(request("long", num_tokens=10_000, **slow))
    bench.arrive(request("s1", num_tokens=64, num_out=1))
    assert lone_tokens(bench, "long", "s1") == [0, 64]
    bench.handle(Aborted("long"))
    bench.arrive(request("s2", num_tokens=3, num_out=1, at_s=bench.now_s))
    assert lone_tokens(bench, "s2") == [3]
    bench.arrive(request("other", num_tokens=10_000, at_s=bench.now_s, **slow))
    bench.arrive(request("s3", num_tokens=64, num_out=1, at_s=bench.now_s))
    assert lone_tokens(bench, "other", "s3") == [0, 64]


def test_each_kvp_rank_keeps_savings_of_its_own() -> None:
    bench = bench_of(kvp=2, max_banked_steps=1.0)
    for name in ("long-a", "long-b"):
        bench.arrive(request(name, num_tokens=10_000, num_out=1, ttft_slo_s=1e6))
    bench.arrive(request("s1", num_tokens=64, num_out=1))
    batch, _ = bench.step()
    ranks = {chunk.request_id: chunk.kvp_ranks for chunk in batch.chunks}
    assert tokens_of(batch).get("s1") == 64 and len(batch.chunks) == 2
    (beside,) = (name for name in ranks if name != "s1")
    assert ranks[beside] != ranks["s1"]
    bench.arrive(request("s2", num_tokens=10, num_out=1, at_s=bench.now_s))
    bench.arrive(request("s3", num_tokens=64, num_out=1, at_s=bench.now_s))
    batch, _ = bench.step()
    ranks = {chunk.request_id: chunk.kvp_ranks for chunk in batch.chunks}
    assert {ranks["s2"], ranks["s3"]} == {(0,), (1,)}
    assert sorted(tokens_of(batch).values()) == [10, 54, 64], "the savings of one rank are spent"


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 1.0])
def test_the_overdue_prefill_gets_a_chunk_whenever_its_share_has_paid_for_half_a_step(share: float) -> None:
    bench = bench_of(policy="srpt", progress_share=share)
    bench.arrive(request("late", num_tokens=5_000, num_out=1, ttft_slo_s=1.0))
    bench.now_s = 10.0
    saved_s = 0.0
    for index in range(24):
        for place in range(4):
            bench.arrive(request(f"s{index}.{place}", num_tokens=64, num_out=1, at_s=bench.now_s))
        saved_s += share * BUDGET_S
        paid = int(saved_s) if saved_s >= BUDGET_S / 2 else 0
        assert lone_tokens(bench, "late") == [paid], f"step {index}"
        saved_s -= paid


def test_the_end_of_an_overdue_prompt_is_paid_for_by_what_it_takes() -> None:
    bench = bench_of(policy="srpt", progress_share=0.125)
    bench.arrive(request("late", num_tokens=80, num_out=1, ttft_slo_s=1.0))
    assert lone_tokens(bench, "late") == [64]
    paid = []
    for index in range(4):
        bench.arrive(*(request(f"s{index}.{place}", num_tokens=9, num_out=1, at_s=bench.now_s) for place in range(8)))
        paid += lone_tokens(bench, "late")
    assert paid == [0, 16, 0, 0], "8 seconds a step: 16 in two"


def test_savings_are_for_the_one_that_is_overdue_longest_and_end_with_it() -> None:
    bench = bench_of(policy="srpt", progress_share=0.25)
    bench.arrive(request("first", num_tokens=5_000, num_out=1, ttft_slo_s=1.0))
    bench.arrive(request("second", num_tokens=5_000, num_out=1, ttft_slo_s=2.0))
    bench.now_s = 10.0

    def crowded_step(index: int) -> list[int]:
        bench.arrive(*(request(f"s{index}.{place}", num_tokens=64, num_out=1, at_s=bench.now_s) for place in range(3)))
        return lone_tokens(bench, "first", "second")

    assert [crowded_step(index) for index in range(2)] == [[0, 0], [32, 0]]
    assert crowded_step(2) == [0, 0]
    bench.handle(Aborted("first"))
    assert [crowded_step(index) for index in (3, 4)] == [[0, 0], [0, 32]]


@pytest.mark.parametrize("max_skips", [0, 1, 3])
@pytest.mark.parametrize("num_tokens", [17, 20])
def test_a_batch_is_closed_after_more_than_max_skips_candidates_that_did_not_fit(
    max_skips: int, num_tokens: int
) -> None:
    for num_too_large in (max_skips, max_skips + 1):
        bench = bench_of(max_skips=max_skips, max_banked_steps=0.0)  # 16 seconds of a step are given away
        bench.arrive(request("long", num_tokens=10_000, num_out=1, ttft_slo_s=1e6))
        bench.arrive(*(request(f"m{place}", num_tokens=num_tokens, num_out=1) for place in range(num_too_large)))
        bench.arrive(request("tiny", num_tokens=16, num_out=1, at_s=0.1))
        assert lone_tokens(bench, "long", "tiny") == ([48, 16] if num_too_large == max_skips else [64, 0])


def test_no_more_own_memory_than_there_are_places_and_the_last_is_kept_for_one_that_is_overdue() -> None:
    bench = bench_of(policy="srpt", max_num_sequences=2, progress_share=0.125)
    bench.arrive(request("late", num_tokens=900, num_out=1, ttft_slo_s=1.0))
    bench.now_s = 5.0
    bench.arrive(*(request(f"s{place}", num_tokens=5, num_out=9, at_s=5.0) for place in range(4)))
    assert set(tokens_of(bench.step()[0])) == {"s0"}
    while bench.sequence("late").is_waiting:
        batch, _ = bench.step()
        assert len({*tokens_of(batch)} - {"late"}) == 1
    assert bench.memory.num_owners == 2


def test_without_one_that_is_overdue_all_places_are_taken_and_no_more() -> None:
    bench = bench_of(policy="srpt", max_num_sequences=2, progress_share=0.125)
    bench.arrive(*(request(f"s{place}", num_tokens=5, num_out=9, ttft_slo_s=1e5) for place in range(4)))
    assert set(tokens_of(bench.step()[0])) == {"s0", "s1"}
    assert bench.memory.num_owners == 2


def test_a_prompt_of_exactly_a_step_is_short_and_one_of_a_token_more_is_long() -> None:
    for num_tokens, expected in ((64, [64, 0]), (65, [0, 64])):
        bench = bench_of(max_banked_steps=1.0)
        bench.arrive(request("a", num_tokens=num_tokens, num_out=1, ttft_slo_s=1e6))
        bench.arrive(request("b", num_tokens=64, num_out=1))
        assert lone_tokens(bench, "a", "b") == expected


def test_short_prompts_fill_the_step_in_order_and_the_last_one_is_cut_where_it_is_full() -> None:
    bench = bench_of()
    bench.arrive(*(request(f"s{place}", num_tokens=30, num_out=1, ttft_slo_s=1.0) for place in range(4)))
    assert tokens_of(bench.step()[0]) == {"s0": 30, "s1": 30, "s2": 4}
    assert tokens_of(bench.step()[0]) == {"s2": 26, "s3": 30}
