"""The scheduler in single situations, event by event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    FinishReason,
    FirstStageDone,
    Output,
    Preempted,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.chunking import Chunking
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware, RooflineCost
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.memory import KVMemory
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request, Sequence, Status
from megatron_medha.core.scheduler import Scheduler

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=100_000,
)  # fmt: skip
# A token costs about 0.25 ms, so a step of 50 ms holds some 190 of them.
HARDWARE = Hardware(name="slow", flops_per_s=1e9, memory_bytes_per_s=1e10, step_overhead_s=2e-3)
COST = RooflineCost(shape=SHAPE, hardware=HARDWARE)


def request(name: str, num_tokens: int = 8, num_out: int = 4, at_s: float = 0.0, **more: Any) -> Request:
    return Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=at_s, **more)


class Bench:
    """A scheduler whose world is moved by hand."""

    def __init__(
        self, *, num_blocks: int = 1000, kvp: int = 1, shard_tokens: int | None = None, spp: int = 1, **config: Any
    ) -> None:
        self.memory = KVMemory(
            num_blocks=num_blocks,
            block_size=4,
            max_context_len=100_000,
            kvp=kvp,
            max_tokens_per_shard=shard_tokens,
            watermark=0.0,
        )
        self.scheduler = Scheduler(SchedulerConfig(**config), COST, self.memory, spp)
        self.now_s = 0.0

    def handle(self, event: Any) -> list[Output]:
        return self.scheduler.handle(event, self.now_s)

    def arrive(self, *requests: Request) -> None:
        for one in requests:
            assert self.handle(Arrived(one)) == []

    def schedule(self) -> Batch:
        batch = self.scheduler.schedule(self.now_s)
        assert batch is not None
        return batch

    def complete(self, batch: Batch, **more: Any) -> list[Output]:
        self.now_s += batch.predicted_s
        return self.handle(Completed(batch_id=batch.batch_id, duration_s=batch.predicted_s, **more))

    def step(self, **more: Any) -> tuple[Batch, list[Output]]:
        batch = self.schedule()
        return batch, self.complete(batch, **more)

    def run(self) -> list[Output]:
        outputs: list[Output] = []
        while (batch := self.scheduler.schedule(self.now_s)) is not None:
            outputs.extend(self.complete(batch))
        return outputs

    def run_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            self.step()

    def sequence(self, name: str) -> Sequence:
        (seq,) = (seq for seq in self.scheduler.sequences if seq.request_id == name)
        return seq

    def assert_empty(self) -> None:
        assert not list(self.scheduler.sequences) and self.scheduler.schedule(self.now_s) is None
        assert [pool.free_extents for pool in self.memory.pools] == [((0, self.memory.num_blocks),)] * self.memory.kvp


def test_a_lone_request_is_prefilled_and_decoded_to_its_length() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=10, num_out=3))
    batch, outputs = bench.step()
    (chunk,) = batch.chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples_token, chunk.new_extents) == (0, 10, True, ((0, 3),))
    assert outputs == [TokenOut("a", 0, None)]
    assert [output.finish_reason for output in bench.run()] == [None, FinishReason.LENGTH]
    bench.assert_empty()


def test_a_stop_token_ends_a_request_early() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=10))
    bench.step()
    _, outputs = bench.step(stopped=("a",))
    assert outputs == [TokenOut("a", 1, FinishReason.STOP)]
    bench.assert_empty()


def test_a_request_that_failed_ends_alone() -> None:
    bench = Bench()
    bench.arrive(request("a"), request("b"))
    _, outputs = bench.step(failed=(("a", "no such token"),))
    assert outputs == [Rejected("a", "no such token", is_client_fault=False), TokenOut("b", 0, None)]
    assert len(bench.run()) == 3
    bench.assert_empty()


def test_what_ended_is_released_with_the_next_batch_once() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=1), request("b", num_out=3))
    bench.step()
    batches = [bench.step()[0] for _ in range(2)]
    assert [batch.released for batch in batches] == [("a",), ()]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (request("a", num_tokens=0), "at least one prompt token"),
        (request("a", num_out=0), "at least one prompt token"),
        (request("a", num_tokens=3990, num_out=11), "exceed the 4000 tokens"),
    ],
)
def test_what_can_never_run_is_rejected_at_once(bad: Request, why: str) -> None:
    bench = Bench()
    (output,) = bench.handle(Arrived(bad))
    assert isinstance(output, Rejected) and why in output.why and output.is_client_fault
    bench.assert_empty()


def test_an_id_in_use_is_rejected_and_the_first_request_unharmed() -> None:
    bench = Bench()
    bench.arrive(request("a"))
    (output,) = bench.handle(Arrived(request("a")))
    assert isinstance(output, Rejected) and "already in use" in output.why
    assert len(bench.run()) == 4


def test_the_largest_request_that_fits_the_memory_runs() -> None:
    bench = Bench(num_blocks=10)
    bench.arrive(request("a", num_tokens=30, num_out=10))
    assert len(bench.run()) == 10
    bench.assert_empty()


# ---- abort, in every state ----


def waiting(bench: Bench) -> Batch | None:
    bench.arrive(request("a"))
    return None


def prefill_in_flight(bench: Bench) -> Batch:
    bench.arrive(request("a"))
    return bench.schedule()


def paused_between_chunks(bench: Bench) -> None:
    bench.arrive(request("a", num_tokens=1000))
    bench.step()
    assert bench.sequence("a").status is Status.PREFILLING


def chunk_in_flight(bench: Bench) -> Batch:
    paused_between_chunks(bench)
    return bench.schedule()


def decoding(bench: Bench) -> None:
    bench.arrive(request("a"))
    bench.step()
    assert bench.sequence("a").status is Status.DECODING


def decode_in_flight(bench: Bench) -> Batch:
    decoding(bench)
    return bench.schedule()


def memory_preempted(bench: Bench) -> None:
    bench.arrive(request("a", num_out=30))
    bench.step()
    bench.handle(RanksLost("test"))
    assert bench.sequence("a").status is Status.WAITING and bench.sequence("a").num_output_tokens == 1


def finished_in_flight(bench: Bench) -> Batch:
    """Already aborted, but its last batch is still out: nothing more may happen to it."""
    batch = decode_in_flight(bench)
    bench.handle(Aborted("a"))
    return batch


STATES = [
    waiting, prefill_in_flight, paused_between_chunks, chunk_in_flight, decoding, decode_in_flight, memory_preempted,
    finished_in_flight,
]  # fmt: skip


@pytest.mark.parametrize("reach", STATES, ids=lambda reach: reach.__name__)
def test_an_abort_ends_a_request_in_every_state_and_returns_its_blocks(reach: Callable[[Bench], Batch | None]) -> None:
    bench = Bench(num_blocks=400)
    batch = reach(bench)
    assert bench.handle(Aborted("a")) == []
    if batch is not None:
        assert bench.memory.num_free_blocks < 400, "blocks in use by a batch in flight stay taken"
        assert bench.complete(batch) == []
    bench.assert_empty()


def test_an_abort_ends_a_request_that_waits_for_a_block() -> None:
    bench = Bench(num_blocks=3, spp=2)
    bench.arrive(request("a", num_tokens=4, num_out=5))
    first = bench.schedule()
    bench.handle(FirstStageDone(first.batch_id))
    bench.arrive(request("b", num_tokens=8, num_out=4))
    second = bench.schedule()
    assert bench.complete(first) == [TokenOut("a", 0, None)]
    bench.handle(FirstStageDone(second.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None, "a waits for a block, b is in flight"
    bench.handle(Aborted("a"))
    assert bench.complete(second) == [TokenOut("b", 1, None)]
    assert len(bench.run()) == 3
    bench.assert_empty()


def test_an_abort_of_an_unknown_request_changes_nothing() -> None:
    bench = Bench()
    assert bench.handle(Aborted("nobody")) == []
    bench.assert_empty()


# ---- memory preemption ----


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


# ---- budget and chunks ----


def test_chunks_of_a_long_prompt_are_whole_tiles_within_the_budget() -> None:
    bench = Bench(tile_tokens=16)
    bench.arrive(request("a", num_tokens=1001))
    batches = []
    while not batches or not batches[-1].chunks[0].samples_token:
        batches.append(bench.step()[0])
    sizes = [batch.chunks[0].num_tokens for batch in batches]
    assert sum(sizes) == 1001 and all(size % 16 == 0 for size in sizes[:-1]) and len(sizes) > 3
    assert all(batch.predicted_s <= batch.budget_s == 0.05 for batch in batches)
    assert sizes == sorted(sizes, reverse=True)


def test_a_prefill_whose_tile_exceeds_the_budget_runs_tile_by_tile() -> None:
    # Also with slack to give away: what nobody takes must come back to it, or the machine would stand still.
    bench = Bench(num_blocks=20_000, step_budget_s=0.01)
    bench.arrive(request("a", num_tokens=50_000, ttft_slo_s=1e6))
    sizes: list[int] = []
    while sum(sizes) < 50_000:
        batch = bench.step()[0]
        sizes.append(batch.chunks[0].num_tokens)
    assert sizes[-2] == 32 and batch.predicted_s > batch.budget_s


def test_a_step_full_of_decodes_still_takes_one_tile() -> None:
    bench = Bench(num_blocks=20_000, step_budget_s=0.01)
    bench.arrive(*(request(f"d{index}", num_tokens=200, num_out=50) for index in range(40)))
    while any(seq.is_prefill for seq in bench.scheduler.sequences):
        bench.step()
    bench.arrive(request("a", num_tokens=100, at_s=bench.now_s))
    batch = bench.schedule()
    assert batch.predicted_s > batch.budget_s
    assert [chunk.num_tokens for chunk in batch.chunks if chunk.request_id == "a"] == [32]


def test_a_tpot_target_lowers_the_budget_while_its_request_decodes() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=3, tpot_slo_s=0.02))
    assert [bench.step()[0].budget_s for _ in range(3)] == [0.05, 0.02, 0.02]
    bench.arrive(request("b", at_s=bench.now_s))
    assert bench.step()[0].budget_s == 0.05


def test_a_budget_below_the_fixed_costs_of_a_step_is_raised_to_twice_them() -> None:
    bench = Bench(step_budget_s=1e-4)
    bench.arrive(request("a"))
    assert bench.schedule().budget_s == 2 * COST.linear_s(1, 1)


def test_decodes_never_overfill_a_step() -> None:
    with pytest.raises(ConfigError, match="scheduler.max_num_sequences=9 .* scheduler.max_batch_tokens=8"):
        SchedulerConfig(max_num_sequences=9, max_batch_tokens=8, tile_tokens=8)


@pytest.mark.parametrize(("chunking", "sizes"), [(Chunking.FIXED, [100, 100, 50]), (Chunking.WHOLE, [250])])
def test_the_baselines_chunk_as_they_are_known_to(chunking: Chunking, sizes: list[int]) -> None:
    bench = Bench(chunking=chunking, fixed_chunk_tokens=100)
    bench.arrive(request("a", num_tokens=250, num_out=1))
    assert [bench.step()[0].chunks[0].num_tokens for _ in sizes] == sizes


# ---- who goes first ----


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


# ---- kvp ----


def test_a_chunk_ends_where_its_shard_does_and_the_next_begins_on_another_rank() -> None:
    bench = Bench(num_blocks=20, kvp=2, shard_tokens=40)
    bench.arrive(request("a", num_tokens=60, num_out=2))
    first, second = bench.step()[0].chunks[0], bench.step()[0].chunks[0]
    assert (first.start, first.num_tokens, first.kvp_ranks, first.new_extents) == (0, 40, (0,), ((0, 10),))
    assert (second.start, second.num_tokens, second.kvp_ranks, second.new_extents) == (40, 20, (0, 1), ((0, 5),))
    third = bench.step()[0].chunks[0]
    assert (third.num_tokens, third.kvp_ranks, third.new_extents) == (1, (0, 1), ((5, 1),))


# ---- stream pipeline ----


def test_the_next_chunk_starts_when_the_last_has_left_the_first_stage() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a", num_tokens=1000))
    first = bench.schedule()
    assert bench.scheduler.schedule(bench.now_s) is None
    bench.handle(FirstStageDone(first.batch_id))
    second = bench.schedule()
    assert second.chunks[0].start == first.chunks[0].num_tokens
    assert bench.sequence("a").num_computed_tokens == 0
    bench.handle(FirstStageDone(second.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None, "as many batches in flight as stages"


def test_a_prompt_decodes_when_its_last_chunk_has_left_the_last_stage() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a"))
    batch = bench.schedule()
    bench.handle(FirstStageDone(batch.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None
    bench.complete(batch)
    assert bench.schedule().chunks[0].start == 8


def test_asking_when_nothing_can_run_changes_no_later_decision() -> None:
    def batches(num_idle_questions: int) -> list[Batch]:
        bench = Bench(num_blocks=30, spp=2, progress_share=0.5)
        bench.arrive(request("a", num_tokens=100, num_out=3))
        bench.now_s, made = 3.0, []
        bench.arrive(request("b", num_tokens=90, at_s=1.0), request("c", num_tokens=90, at_s=2.0))
        while (batch := bench.scheduler.schedule(bench.now_s)) is not None:
            made.append(batch)
            bench.handle(FirstStageDone(batch.batch_id))
            for _ in range(num_idle_questions):
                idle = bench.scheduler.schedule(bench.now_s)
                assert idle is None
            bench.complete(batch)
        return made

    assert batches(0) == batches(5)
