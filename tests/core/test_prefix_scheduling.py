"""What a cached prefix changes for a request: where it begins, its work and deadline, and for whom it waits."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from content_world import GRANULE, keys_of
from scheduler_bench import Bench, request

from megatron_medha.core.batch import Aborted, Preempted, RanksLost, TokenOut
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.request import Request

KV = KVConfig(granule_tokens=GRANULE)


def tokens(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(100), k=num_tokens)


def keyed(name: str, prompt: list[int], num_out: int = 1, **more: Any) -> Request:
    return request(name, len(prompt), num_out, prefix_keys=keys_of(prompt), **more)


def cached(bench: Bench, prompt: list[int]) -> Bench:
    """A bench in whose cache the prompt is."""
    bench.arrive(keyed("first", prompt))
    bench.run()
    return bench


def computed(bench: Bench) -> dict[str, list[tuple[int, int]]]:
    """Runs to the end: the chunks of each request, as (start, tokens)."""
    chunks: dict[str, list[tuple[int, int]]] = {}
    while (batch := bench.scheduler.schedule(bench.now_s)) is not None:
        for chunk in batch.chunks:
            chunks.setdefault(chunk.request_id, []).append((chunk.start, chunk.num_tokens))
        bench.complete(batch)
    return chunks


def test_a_prompt_begins_behind_what_is_cached_and_computes_at_least_its_last_token() -> None:
    prompt = tokens(64)
    bench = cached(Bench(kv=KV), prompt)
    bench.arrive(keyed("again", prompt), keyed("longer", [*prompt, 1, 2, 3]), keyed("other", tokens(64, seed=1)))
    assert computed(bench) == {"again": [(56, 8)], "longer": [(64, 3)], "other": [(0, 64)]}


def test_the_first_token_says_how_much_of_the_prompt_was_cached() -> None:
    bench = cached(Bench(kv=KV), tokens(64))
    bench.arrive(keyed("again", tokens(64), num_out=3))
    outs = [output.num_cached_tokens for output in bench.run() if isinstance(output, TokenOut)]
    assert outs == [56, 0, 0]


def test_who_wants_its_whole_prompt_computed_gets_no_hit_and_others_have_its_kv() -> None:
    bench = cached(Bench(kv=KV), tokens(64))
    bench.arrive(keyed("scored", tokens(80), reads_cache=False))
    assert computed(bench)["scored"] == [(0, 80)]
    bench.arrive(keyed("again", tokens(80)))
    assert computed(bench)["again"] == [(72, 8)]


def test_without_keys_nothing_is_read_or_kept() -> None:
    bench = cached(Bench(kv=KV), tokens(64))
    bench.arrive(request("unnamed", 64, 1))
    assert computed(bench)["unnamed"] == [(0, 64)]
    assert bench.memory.cache.index.num_evictable_blocks(0) == 16


def test_work_and_deadline_are_those_of_what_is_not_cached() -> None:
    prompt = tokens(1600)
    bench = cached(Bench(kv=KV, min_deadline_s=1e-3), prompt)
    bench.arrive(keyed("turn", [*prompt, *tokens(160, seed=1)], at_s=bench.now_s))
    seq, predicted = bench.sequence("turn"), bench.scheduler.predicted_prefill_s
    assert seq.num_unscheduled_tokens == 160
    assert seq.total_work_s == seq.remaining_work_s == pytest.approx(predicted(1760) - predicted(1600))
    assert seq.deadline_s == pytest.approx(bench.now_s + 1.5 * seq.total_work_s)


def test_work_behind_a_prefix_is_never_less_than_a_step_of_as_many_tokens() -> None:
    prompt = tokens(1600)
    bench = cached(Bench(kv=KV), prompt)
    bench.arrive(keyed("turn", [*prompt, 1]))
    assert bench.sequence("turn").total_work_s == bench.scheduler.predicted_prefill_s(1)


def blocked(bench: Bench) -> None:
    """The only place is taken by a decode: a request that comes waits."""
    bench.arrive(request("blocker", 8, 100))
    bench.step()


def test_a_prefix_that_is_published_while_a_request_waits_is_progress_and_keeps_its_deadline() -> None:
    prompt = tokens(160)
    bench = Bench(kv=KV, max_num_sequences=2, min_deadline_s=1e-3)
    blocked(bench)
    bench.arrive(keyed("first", prompt), keyed("other", [*prompt, *tokens(80, seed=1)], ttft_slo_s=1e3))
    deadline_s, work_s = bench.sequence("other").deadline_s, bench.sequence("other").total_work_s
    bench.run_until(lambda: bench.scheduler.sequence("first") is None)
    seq = bench.sequence("other")
    assert seq.is_waiting and seq.num_cached_tokens == 160 and seq.remaining_work_s < work_s / 2
    assert (seq.deadline_s, seq.total_work_s) == (deadline_s, work_s)


def test_a_prefix_that_is_evicted_while_a_request_waits_moves_its_deadline() -> None:
    prompt = tokens(160)
    bench = cached(Bench(kv=KV, num_blocks=60, max_num_sequences=2, min_deadline_s=1e-3), prompt)
    blocked(bench)
    bench.arrive(request("large", 80, 20, ttft_slo_s=0.01))
    bench.arrive(keyed("turn", [*prompt, *tokens(8, seed=1)], at_s=bench.now_s))
    before = bench.sequence("turn").deadline_s, bench.sequence("turn").total_work_s
    bench.run_until(lambda: bench.sequence("turn").num_cached_tokens < 160)
    seq = bench.sequence("turn")
    assert seq.is_waiting and seq.deadline_s > before[0] and seq.total_work_s > before[1]


def test_a_preempted_request_begins_again_behind_what_it_has_published_outputs_too() -> None:
    bench = Bench(kv=KV, num_blocks=1000)
    prompt = tokens(60)
    bench.arrive(keyed("a", prompt, num_out=60))
    for _ in range(30):
        seq = bench.sequence("a")
        known = [*prompt, *range(seq.num_output_tokens + 1)]
        filled = (("a", keys_of(known)[-16:]),) if len(known) % GRANULE == 0 else ()
        bench.step(filled_keys=filled)
    seq = bench.sequence("a")
    num_computed = seq.num_computed_tokens
    preempted = bench.scheduler._preempt(seq, bench.now_s)
    assert seq.num_cached_tokens == num_computed // GRANULE * GRANULE > 60
    assert preempted == Preempted("a", num_computed - seq.num_cached_tokens, seq.num_cached_tokens)
    assert bench.schedule().chunks[0].start == seq.num_cached_tokens


@pytest.mark.parametrize("num_blocks", [29, 30, 60])
def test_a_lone_decode_that_holds_a_prefix_twice_begins_again_rather_than_wait_for_ever(num_blocks: int) -> None:
    bench = cached(Bench(kv=KV, num_blocks=num_blocks), tokens(80))
    bench.arrive(keyed("scored", [*tokens(80), *tokens(10, seed=1)], num_out=25, reads_cache=False))
    outputs = bench.run()
    assert sum(isinstance(output, TokenOut) for output in outputs) == 25
    assert any(isinstance(output, Preempted) for output in outputs) == (num_blocks < 60)
    assert not bench.scheduler.num_sequences
    assert bench.memory.num_free_blocks == num_blocks


def order(bench: Bench, *requests: Request) -> list[str]:
    """Whose chunks ran, one after another, where each of the requests comes a step after the one before."""
    names: list[str] = []
    coming = list(requests)
    while coming or bench.scheduler.num_sequences:
        if coming:
            bench.arrive(replace(coming.pop(0), arrival_s=bench.now_s))
        batch = bench.scheduler.schedule(bench.now_s)
        assert batch is not None
        names += [chunk.request_id for chunk in batch.chunks]
        bench.complete(batch)
    return names


def test_of_turns_alike_the_first_runs_to_its_end_and_uncached_prompts_alternate() -> None:
    prompts = {"one": tokens(1_600, seed=1), "two": tokens(1_600, seed=2)}
    bench = Bench(kv=KV, num_blocks=3000, min_deadline_s=1e-3)
    for name, prompt in prompts.items():
        bench.arrive(keyed(f"before {name}", prompt))
        bench.run()
    turns = [keyed(name, [*prompt, *tokens(800, seed=3)]) for name, prompt in prompts.items()]
    ran = order(bench, *turns)
    assert len(ran) > 6 and ran == sorted(ran)
    ran = order(bench, *[keyed(name, tokens(1_200, seed=ord(name))) for name in "ab"])
    assert len(ran) > 6 and ran != sorted(ran)


def test_a_turn_is_never_put_behind_those_that_can_be_in_time_unless_its_prefix_is_evicted() -> None:
    prompt = tokens(160)
    bench = cached(Bench(kv=KV, num_blocks=60, max_num_sequences=2, min_deadline_s=1e-3), prompt)
    blocked(bench)
    bench.arrive(request("large", 140, 20, ttft_slo_s=0.01))
    bench.arrive(keyed("turn", [*prompt, *tokens(8, seed=1)], at_s=bench.now_s))
    assert bench.sequence("turn").triage_deadline_s == inf
    bench.run_until(lambda: bench.sequence("turn").num_cached_tokens < 80)
    assert bench.sequence("turn").triage_deadline_s < inf


def test_lost_ranks_have_nothing_cached() -> None:
    bench = cached(Bench(kv=KV), tokens(64))
    bench.arrive(keyed("again", tokens(64)))
    bench.handle(RanksLost("test"))
    assert bench.sequence("again").num_cached_tokens == 0
    assert computed(bench)["again"] == [(0, 64)]


# ---- siblings ----


def test_of_equal_prompts_one_is_computed_and_the_others_begin_behind_it() -> None:
    bench = Bench(kv=KV)
    bench.arrive(*(keyed(name, tokens(1600)) for name in "abcd"))
    chunks = computed(bench)
    assert sum(count for _, count in chunks["a"]) == 1600
    assert [chunks[name] for name in "bcd"] == [[(1592, 8)]] * 3


def test_who_differs_later_waits_only_for_what_is_common() -> None:
    stem = tokens(800)
    bench = Bench(kv=KV, num_blocks=5000)
    bench.arrive(keyed("a", [*stem, *tokens(4000, seed=1)]), keyed("b", [*stem, *tokens(900, seed=2)]))
    chunks = computed(bench)
    assert sorted(chunks[name][0][0] for name in "ab") == [0, 800]
    assert sum(count for name in "ab" for _, count in chunks[name]) == 800 + 4000 + 900


def test_short_prompts_that_share_a_step_at_little_cost_do_not_wait() -> None:
    bench = Bench(kv=KV)
    bench.arrive(keyed("a", tokens(9)), keyed("b", tokens(9)))
    assert len(bench.schedule().chunks) == 2


def test_one_that_comes_later_waits_for_the_prefill_under_way() -> None:
    bench = Bench(kv=KV)
    bench.arrive(keyed("a", tokens(3200)))
    bench.step()
    bench.arrive(keyed("b", tokens(3200), at_s=bench.now_s))
    chunks = computed(bench)
    assert chunks["b"] == [(3192, 8)]


def test_the_one_that_computes_is_as_urgent_as_who_waits_for_it() -> None:
    def batches_until(is_awaited: bool) -> int:
        bench = Bench(kv=KV, num_blocks=20_000, has_space_sharing=False, progress_share=0.0)
        stem = tokens(1600)
        bench.arrive(keyed("slow", stem, ttft_slo_s=1e4))
        bench.step()
        bench.arrive(request("rival", 16_000, 1, ttft_slo_s=100.0))
        prompt = [*stem, 1] if is_awaited else tokens(8, seed=9)
        bench.arrive(keyed("urgent", prompt, ttft_slo_s=0.01))
        count = 0
        while bench.scheduler.sequence("slow") is not None:
            bench.step()
            count += 1
        return count

    assert batches_until(is_awaited=True) < 60 < 300 < batches_until(is_awaited=False)


@pytest.mark.parametrize("how", ["aborted", "failed"])
def test_who_waited_computes_the_rest_when_the_other_is_gone(how: str) -> None:
    bench = Bench(kv=KV)
    bench.arrive(keyed("a", tokens(1600)), keyed("b", tokens(1600)))
    bench.step()
    batch, _ = bench.step(failed=(("a", "not a number"),) if how == "failed" else ())
    num_computed = sum(chunk.start + chunk.num_tokens for chunk in batch.chunks) // GRANULE * GRANULE
    if how == "aborted":
        bench.handle(Aborted("a"))
    chunks = computed(bench)
    assert chunks["b"][0][0] == (num_computed if how == "aborted" else 0)
    assert sum(count for _, count in chunks["b"]) == 1600 - chunks["b"][0][0]


def test_the_progress_share_of_an_overdue_request_goes_to_the_one_it_waits_for() -> None:
    bench = Bench(kv=KV, num_blocks=20_000, progress_share=0.2, has_triage=False)
    stem = tokens(1600)
    bench.arrive(keyed("slow", stem, ttft_slo_s=1e4, priority=2))
    bench.step()
    bench.arrive(keyed("late", [*stem, 1], ttft_slo_s=0.01, priority=1))
    bench.arrive(request("rival", 50_000, 1, ttft_slo_s=100.0))
    for _ in range(200):
        if bench.scheduler.sequence("late") is None:
            break
        bench.step()
    assert bench.scheduler.sequence("late") is None and bench.scheduler.sequence("rival") is not None


# ---- KVP ranks ----


def on_two_ranks(num_cached: int, num_busy: int) -> tuple[Bench, list[int]]:
    """A prompt is cached on rank 0, which then has another's prefill before it."""
    bench = Bench(kv=KV, num_blocks=20_000, kvp=2, shard_tokens=40_000, progress_share=0.0)
    prompt = tokens(num_cached)
    bench = cached(bench, prompt)
    assert bench.memory.cache.index.num_evictable_blocks(0) == num_cached // 4
    if num_busy:
        bench.arrive(request("busy", num_busy, 1, ttft_slo_s=1e3))
        bench.step()
        assert bench.sequence("busy").block_table.kvp_ranks == (0,)
    return bench, prompt


@pytest.mark.parametrize(
    ("num_cached", "num_busy", "rank"),
    [(800, 0, 0), (800, 4000, 1), (8000, 4000, 0)],
    ids=["idle", "the wait is longer", "the wait is shorter"],
)
def test_hits_are_taken_where_they_save_more_than_the_wait_for_that_rank(
    num_cached: int, num_busy: int, rank: int
) -> None:
    bench, prompt = on_two_ranks(num_cached, num_busy)
    turn = keyed("turn", [*prompt, *tokens(8, seed=1)], num_out=50, ttft_slo_s=0.1, at_s=bench.now_s)
    bench.arrive(turn)
    bench.run_until(lambda: not bench.sequence("turn").is_waiting)
    seq = bench.sequence("turn")
    assert (seq.block_table.kvp_ranks, seq.num_cached_tokens) == ((rank,), 0 if rank else num_cached)


def test_a_prefix_that_is_computed_again_beside_a_busy_rank_is_cached_on_both() -> None:
    bench, prompt = on_two_ranks(800, 4000)
    bench.arrive(keyed("turn", [*prompt, *tokens(8, seed=1)], ttft_slo_s=0.1, at_s=bench.now_s))
    bench.run_until(lambda: bench.scheduler.sequence("turn") is None)
    index = bench.memory.cache.index
    assert [index.match(keys_of(prompt), 0, 100, rank).num_granules for rank in (0, 1)] == [100, 100]


def test_a_prefix_over_several_shards_is_found_on_their_ranks() -> None:
    bench = Bench(kv=KV, kvp=3, shard_tokens=160)
    prompt = tokens(400)
    cached(bench, prompt)
    bench.arrive(keyed("turn", [*prompt, *tokens(8, seed=1)]))
    batch, _ = bench.step()
    assert (batch.chunks[0].start, batch.chunks[0].num_tokens, batch.chunks[0].kvp_ranks) == (400, 8, (0, 1, 2))
    assert [op.kvp_rank for op in batch.kv_ops] == [0, 1, 2]


def test_a_lone_session_does_not_leave_all_work_to_the_rank_where_its_prefix_lies() -> None:
    bench, prompt = on_two_ranks(200, 0)
    ranks = []
    for turn in range(60):
        bench.arrive(keyed(f"turn {turn}", [*prompt, *tokens(8, seed=turn + 1)], num_out=64, at_s=bench.now_s))
        bench.run_until(lambda: not any(seq.is_prefill for seq in bench.scheduler.sequences))
        ranks += [seq.block_table.kvp_ranks[0] for seq in bench.scheduler.sequences]
        bench.run()
    assert 24 <= ranks.count(1) <= 36
    work_s = bench.memory.work_s
    assert max(work_s) <= 1.2 * min(work_s)


def test_many_that_decode_behind_one_prefix_do_not_all_go_where_it_lies() -> None:
    bench, prompt = on_two_ranks(200, 0)
    for turn in range(60):
        bench.arrive(keyed(f"turn {turn}", [*prompt, *tokens(8, seed=turn + 1)], num_out=512, at_s=bench.now_s))
    bench.run_until(lambda: not any(seq.is_prefill for seq in bench.scheduler.sequences))
    ranks = [seq.block_table.kvp_ranks for seq in bench.scheduler.sequences]
    assert len(ranks) == 60 and 20 <= ranks.count((1,)) <= 40
