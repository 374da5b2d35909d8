"""Who loses its KV when memory or the ranks are gone, and how it goes on."""

from __future__ import annotations

from scheduler_bench import Bench, request

from megatron_medha.core.batch import Aborted, FirstStageDone, Output, Preempted, RanksLost, TokenOut
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling import preemption


def test_a_decode_that_needs_a_block_takes_it_from_whoever_has_the_most_relative_slack() -> None:
    bench = Bench(num_blocks=5)
    bench.arrive(request("a", num_tokens=8, num_out=8))
    bench.step()
    bench.now_s = 0.2
    bench.arrive(request("b", num_tokens=7, num_out=5, at_s=0.2))
    outputs: list[Output] = []
    while not any(isinstance(output, Preempted) for output in outputs):
        outputs = bench.step()[1]
    (preempted,) = (output for output in outputs if isinstance(output, Preempted))
    assert preempted.request_id == "b" and preempted.num_tokens_lost >= 7
    rest = bench.run()
    counts = {name: sum(isinstance(o, TokenOut) and o.request_id == name for o in rest) for name in "ab"}
    assert all(counts.values())
    bench.assert_empty()


def test_a_preempted_request_computes_its_known_tokens_again_and_says_nothing_twice() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=10, num_out=5))
    bench.step()
    bench.step()
    bench.handle(RanksLost("test"))
    batch, outputs = bench.step()
    (chunk,) = batch.chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples_token) == (0, 12, True)
    assert outputs == [TokenOut("a", 2, None)]
    assert len(bench.run()) == 2
    bench.assert_empty()


def test_lost_ranks_forget_nothing_they_never_knew() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=1), request("b"))
    bench.step()
    bench.handle(RanksLost("test"))
    assert bench.schedule().released == ()


def decoding(bench: Bench, *requests: Request) -> None:
    """All of them, with their first token out, so that each owns blocks and waits for its next step."""
    bench.arrive(*requests)
    bench.run_until(lambda: all(bench.sequence(one.request_id).num_output_tokens for one in requests))


def victim(bench: Bench, needy: str) -> str | None:
    scheduler = bench.scheduler
    overdue = scheduler._longest_overdue(bench.now_s)
    found = preemption.victim(
        bench.memory, bench.sequence(needy), bench.now_s, scheduler.config.progress_share, overdue
    )
    return None if found is None else found.request_id


def exempt(bench: Bench, owners: list[Sequence], now_s: float) -> list[str]:
    scheduler = bench.scheduler
    return preemption.exempt(owners, now_s, scheduler.config.progress_share, scheduler._longest_overdue(now_s))


def test_of_equal_slack_the_one_that_came_last_gives_up_its_memory_and_then_the_one_with_the_last_name() -> None:
    bench = Bench()
    decoding(bench, *(request(name, at_s=at_s, ttft_slo_s=9.0 - at_s) for name, at_s in (("c", 0), ("a", 0), ("b", 1))))
    for name in "abc":
        bench.sequence(name).total_work_s, bench.sequence(name).remaining_work_s = 1.0, 0.0
    assert victim(bench, "a") == victim(bench, "b") == "b"
    bench.handle(Aborted("b"))
    assert victim(bench, "a") == victim(bench, "c") == "c"


def test_relative_slack_goes_before_arrival_and_may_hit_the_needy_one_itself() -> None:
    bench = Bench()
    decoding(bench, request("a", ttft_slo_s=9.0), request("b", at_s=1.0, ttft_slo_s=5.0))
    for name in "ab":
        bench.sequence(name).total_work_s, bench.sequence(name).remaining_work_s = 1.0, 0.0
    assert victim(bench, "a") == victim(bench, "b") == "a"
    bench.sequence("a").total_work_s = 2.0
    assert victim(bench, "a") == "b"


def test_nobody_else_means_nobody() -> None:
    bench = Bench()
    decoding(bench, request("a"))
    assert victim(bench, "a") is None


def test_who_is_in_flight_or_has_ended_is_no_victim() -> None:
    bench = Bench(spp=2)
    decoding(bench, request("a", ttft_slo_s=1.0), request("b", ttft_slo_s=9.0))
    assert victim(bench, "a") == "b"
    bench.sequence("b").num_batches_in_flight = 1
    assert victim(bench, "a") is None
    bench.sequence("b").num_batches_in_flight = 0
    bench.sequence("b").move_to(Status.FINISHED)
    assert victim(bench, "a") is None


def test_only_an_owner_on_a_rank_where_a_block_would_help_is_a_victim() -> None:
    bench = Bench(kvp=2, shard_tokens=4000)
    decoding(bench, request("a", ttft_slo_s=1.0), request("b", ttft_slo_s=9.0), request("c", ttft_slo_s=8.0))
    on = {name: bench.sequence(name).block_table.kvp_ranks for name in "abc"}
    (beside,) = (name for name in "bc" if on[name] == on["a"])
    assert len(set(on.values())) == 2 and victim(bench, "a") == beside


def test_when_others_are_late_the_earliest_deadline_and_the_longest_overdue_prefill_keep_their_memory() -> None:
    bench = Bench(progress_share=0.1)
    decoding(bench, *(request(name, ttft_slo_s=slo_s) for name, slo_s in (("a", 5.0), ("b", 6.0), ("c", 7.0))))
    for name in "abc":
        bench.sequence(name).total_work_s, bench.sequence(name).remaining_work_s = 1.0, 0.0
    bench.sequence("a").total_work_s = 1e9  # late by next to nothing of its own work: the most slack
    bench.now_s = 5.5
    assert victim(bench, "b") == "c", "the earliest deadline has passed"
    bench.now_s = 5.0
    bench.sequence("c").total_work_s = 1e9
    assert victim(bench, "b") == "b", "nobody is late yet"


def test_the_earliest_deadline_is_kept_before_the_longest_overdue_prefill_and_that_before_all_others() -> None:
    bench = Bench(progress_share=0.1)
    decoding(bench, request("a", ttft_slo_s=0.5), request("b", ttft_slo_s=2.0))
    bench.arrive(request("p", num_tokens=3000, at_s=0.0, ttft_slo_s=1.0))
    bench.step()
    assert bench.sequence("p").is_prefill
    bench.now_s = 3.0
    owners = [bench.sequence(name) for name in "abp"]
    assert exempt(bench, owners, 3.0) == ["p", "a", "a"]
    assert exempt(bench, owners[1:], 3.0) == ["p", "p", "p"]
    assert exempt(bench, owners, 0.5) == []
    assert exempt(bench, owners, 0.75) == ["a", "a"]


def test_without_a_progress_share_nobody_is_kept_from_preemption() -> None:
    bench = Bench(progress_share=0.0)
    decoding(bench, request("a", ttft_slo_s=0.1), request("b", ttft_slo_s=0.2))
    assert exempt(bench, list(bench.scheduler.sequences), 9.0) == []


def test_a_decode_that_finds_no_victim_waits_and_grows_with_the_next_event() -> None:
    bench = Bench(num_blocks=4, spp=2, progress_share=0.0)
    bench.arrive(request("a", num_tokens=7, num_out=9, ttft_slo_s=9.0))
    bench.run_until(lambda: bench.sequence("a").num_computed_tokens == 11)
    batch = bench.schedule()
    bench.handle(FirstStageDone(batch.batch_id))
    bench.arrive(request("b", num_tokens=4, num_out=5, ttft_slo_s=0.1))
    beside = bench.schedule()
    assert [chunk.request_id for chunk in beside.chunks] == ["b"]
    assert bench.complete(batch) == [TokenOut("a", batch.batch_id, None)], "the only other owner is in flight"
    bench.handle(FirstStageDone(beside.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None
    assert bench.complete(beside) == [TokenOut("b", beside.batch_id, None), Preempted("a", 12)]
    assert bench.schedule().chunks[0].request_id == "b"
