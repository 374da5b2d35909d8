"""Which prefills get into a step: policies, space sharing, the share of the overdue."""

from __future__ import annotations

from scheduler_bench import COST, Bench, request

from megatron_medha.core.batch import Aborted, FirstStageDone


def test_a_short_prompt_shares_the_step_of_a_long_one_that_has_slack() -> None:
    bench = Bench(num_blocks=5000)
    bench.arrive(request("long", num_tokens=5000))
    for _ in range(3):
        bench.step()
    bench.arrive(request("short", num_tokens=50, at_s=bench.now_s))
    batch = bench.schedule()
    assert {chunk.request_id for chunk in batch.chunks} == {"long", "short"}
    assert batch.predicted_s <= batch.budget_s


def test_a_short_prompt_shares_the_step_of_a_long_one_behind_any_number_of_other_long_ones() -> None:
    bench = Bench(num_blocks=20_000, policy="fcfs", max_skips=2)
    bench.arrive(*(request(f"long-{index}", num_tokens=1000, at_s=0.001 * index) for index in range(30)))
    bench.arrive(request("short", num_tokens=50, at_s=1.0))
    assert {chunk.request_id for chunk in bench.schedule().chunks} == {"long-0", "short"}


def test_a_long_prefill_whose_first_step_goes_to_short_ones_owns_nothing_yet() -> None:
    bench = Bench(num_blocks=20_000, policy="fcfs", max_num_sequences=100)
    bench.arrive(request("long", num_tokens=20_000, ttft_slo_s=1e4))
    bench.arrive(*(request(f"s{index}", num_tokens=40, at_s=0.001) for index in range(5)))
    assert {chunk.request_id for chunk in bench.schedule().chunks} == {f"s{index}" for index in range(5)}
    long = bench.sequence("long")
    assert long.is_waiting and not long.block_table.shards


def test_over_time_a_long_prefill_gives_away_no_more_than_its_slack_allows() -> None:
    bench = Bench(num_blocks=20_000, policy="fcfs", max_relative_slack=0.4, max_num_sequences=100)
    bench.arrive(request("long", num_tokens=20_000, ttft_slo_s=1e4))
    spent_s = {"long": 0.0, "short": 0.0}
    for index in range(60):
        bench.arrive(*(request(f"s{index}-{i}", num_tokens=40, num_out=1, at_s=bench.now_s) for i in range(5)))
        batch = bench.schedule()
        for chunk in batch.chunks:
            seconds = COST.attention_s(chunk.start, chunk.num_tokens)
            seconds += COST.linear_s(chunk.num_tokens, 1) - COST.linear_s(0, 0)
            spent_s["long" if chunk.request_id == "long" else "short"] += seconds
        bench.complete(batch)
        for seq in list(bench.scheduler.sequences):
            if seq.is_prefill and seq.request_id != "long" and seq.num_scheduled_tokens == 0:
                bench.handle(Aborted(seq.request_id))
    share = spent_s["short"] / (spent_s["short"] + spent_s["long"])
    assert 0.3 <= share <= 0.41


def test_a_long_prefill_that_saves_nothing_up_still_leaves_each_step_the_share_its_slack_allows() -> None:
    bench = Bench(num_blocks=20_000, policy="fcfs", max_relative_slack=0.4, max_banked_steps=0.0)
    bench.arrive(request("long", num_tokens=20_000, ttft_slo_s=1e4))
    alone = bench.step()[0].chunks[0].num_tokens
    bench.arrive(request("short", num_tokens=40, at_s=bench.now_s))
    tokens = {chunk.request_id: chunk.num_tokens for chunk in bench.schedule().chunks}
    assert tokens["short"] == 40
    assert 0 < tokens["long"] < alone


def test_without_space_sharing_the_most_urgent_prefill_takes_the_whole_step() -> None:
    bench = Bench(num_blocks=5000, has_space_sharing=False, policy="fcfs")
    bench.arrive(request("long", num_tokens=5000), request("short", num_tokens=50, at_s=0.01))
    assert [chunk.request_id for chunk in bench.schedule().chunks] == ["long"]


def test_two_long_prefills_do_not_share_a_step() -> None:
    bench = Bench(num_blocks=5000)
    bench.arrive(request("one", num_tokens=5000), request("other", num_tokens=5000, at_s=0.01))
    assert len(bench.schedule().chunks) == 1


def test_long_prefills_on_different_kvp_ranks_do_share_a_step() -> None:
    bench = Bench(num_blocks=5000, kvp=2)
    bench.arrive(request("one", num_tokens=5000), request("other", num_tokens=5000, at_s=0.01))
    assert {chunk.kvp_ranks for chunk in bench.schedule().chunks} == {(0,), (1,)}


def test_without_preemption_a_prefill_that_has_begun_goes_on() -> None:
    bench = Bench(policy="sjf", is_preemptive=False, has_space_sharing=False, progress_share=0.0)
    bench.arrive(request("long", num_tokens=500))
    bench.step()
    bench.arrive(request("short", num_tokens=5, at_s=bench.now_s))
    assert bench.schedule().chunks[0].request_id == "long"


def test_a_lower_priority_class_goes_first() -> None:
    bench = Bench(policy="fcfs", max_num_sequences=1)
    bench.arrive(request("a", priority=1), request("b", priority=0))
    assert [chunk.request_id for chunk in bench.schedule().chunks] == ["b"]


def test_paused_prefills_are_found_behind_any_number_that_find_no_memory() -> None:
    # The paused one owns the memory that the more urgent ones wait for: were it not found, all would stand still.
    bench = Bench(num_blocks=300, policy="sjf", progress_share=0.0, max_skips=2)
    bench.arrive(request("owner", num_tokens=1100))
    bench.step()
    bench.arrive(*(request(f"r{index}", num_tokens=1000 + index, at_s=0.01) for index in range(50)))
    assert [chunk.request_id for chunk in bench.schedule().chunks] == ["owner"]


def test_the_overdue_prefill_that_is_first_by_policy_gets_a_whole_step_not_its_share() -> None:
    bench = Bench(num_blocks=5000, policy="edf", tile_tokens=4, has_triage=False)
    bench.arrive(request("late", num_tokens=3000))
    bench.now_s = 100.0
    bench.arrive(*(request(f"s{index}", num_tokens=60, num_out=1, at_s=100.0) for index in range(9)))
    for _ in range(9):  # saved enough for a chunk of its own half of the way
        assert [chunk.request_id for chunk in bench.step()[0].chunks] == ["late"]


def test_time_that_an_overdue_prefill_waits_for_memory_is_not_saved_up_for_it() -> None:
    bench = Bench(num_blocks=320, policy="srpt", max_num_sequences=64, step_budget_s=0.05)
    bench.arrive(request("owner", num_tokens=100, num_out=400))
    bench.step()
    bench.arrive(request("late", num_tokens=1200, at_s=bench.now_s, ttft_slo_s=0.1))
    for _ in range(380):  # the owner's decodes keep more blocks than the late one leaves
        bench.step()
    assert bench.sequence("late").is_waiting and bench.now_s > bench.sequence("late").deadline_s
    while bench.sequence("late").is_waiting:
        bench.step()
    late_steps = 0
    for index in range(10):
        bench.arrive(*(request(f"t{index}-{i}", num_tokens=30, num_out=1, at_s=bench.now_s) for i in range(6)))
        batch, _ = bench.step()
        late_steps += any(chunk.request_id == "late" and chunk.num_tokens > 32 for chunk in batch.chunks)
    assert late_steps <= 3, "a share of the steps, not all of them"


def test_nothing_stays_reserved_for_one_that_is_gone() -> None:
    bench = Bench(num_blocks=30, progress_share=1.0, min_deadline_s=0.01)
    bench.arrive(request("owner", num_tokens=80, num_out=3))
    bench.step()
    bench.arrive(request("late", num_tokens=110, at_s=bench.now_s))
    bench.now_s += 10.0
    bench.arrive(request("small", num_tokens=4, num_out=1, at_s=bench.now_s))
    bench.run_until(lambda: not any(seq.request_id == "owner" for seq in bench.scheduler.sequences))
    bench.handle(Aborted("late"))
    bench.arrive(request("next", num_tokens=110, num_out=1, at_s=bench.now_s))
    assert any(chunk.request_id == "next" for chunk in bench.schedule().chunks)


def test_asking_for_a_batch_when_nothing_can_run_leaves_what_is_reserved() -> None:
    # A replay asks only where a batch was formed.
    bench = Bench(num_blocks=10, spp=2)
    bench.arrive(request("owner", num_tokens=30, num_out=9))
    bench.step()
    bench.arrive(request("late", num_tokens=30, at_s=bench.now_s, ttft_slo_s=0.01))
    bench.now_s += 1.0
    batch = bench.schedule()
    bench.handle(FirstStageDone(batch.batch_id))
    reservation = bench.memory.reservation
    assert reservation is not None and reservation.request_id == "late"
    bench.arrive(request("later", num_tokens=30, at_s=bench.now_s - 2.0, ttft_slo_s=0.0))
    assert bench.scheduler.schedule(bench.now_s) is None
    assert bench.memory.reservation is reservation
