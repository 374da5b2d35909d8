"""Random workloads, faults and configurations: whatever happens, the scheduler keeps its promises."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.lib.recording_runtime import RecordingSimRuntime
from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Chunk,
    Completed,
    Event,
    FinishReason,
    FirstStageDone,
    Output,
    Preempted,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost, StepLoad, step_s
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.kv.sequence import Status
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import Observer
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.sim.held_batches import InterruptiblePipeline
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.stats.decision_log import DecisionLog, read_log, replay

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=400,
)  # fmt: skip
# So slow that a tile is a matter of milliseconds: budgets bind with prompts of a few dozen tokens.
HARDWARE = Hardware(
    name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4, layer_overhead_s=2e-5
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One world."""

    config: SchedulerConfig
    memory: dict[str, int | None]
    spp: int
    requests: tuple[Request, ...]
    aborts: tuple[tuple[float, str], ...]
    losses_s: tuple[float, ...]
    stop_rate: float
    fail_rate: float
    learns: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kvp = draw(st.sampled_from([1, 1, 2, 3]))
    num_blocks = draw(st.integers(4, 24))
    block_size = 4
    shard_blocks = None if kvp == 1 else draw(st.integers(1, num_blocks))
    max_batch_tokens = draw(st.sampled_from([12, 40, 400]))
    config = SchedulerConfig(
        policy=draw(st.sampled_from(sorted(POLICIES))),
        is_preemptive=draw(st.booleans()),
        chunking=draw(st.sampled_from([Chunking.ADAPTIVE, Chunking.ADAPTIVE, Chunking.FIXED, Chunking.WHOLE])),
        step_budget_s=draw(st.sampled_from([1e-4, 2e-3, 0.01, 0.05])),
        tile_tokens=draw(st.sampled_from([1, 4, 8])),
        fixed_chunk_tokens=draw(st.sampled_from([8, 32])),
        max_batch_tokens=max_batch_tokens,
        max_num_sequences=draw(st.integers(1, min(12, max_batch_tokens))),
        min_deadline_s=draw(st.sampled_from([1e-3, 0.5])),
        has_space_sharing=draw(st.booleans()),
        max_banked_steps=draw(st.sampled_from([0.0, 1.0, 3.0])),
        progress_share=draw(st.sampled_from([0.0, 0.1, 0.5])),
        max_skips=draw(st.sampled_from([0, 1, 10])),
        watermark=draw(st.sampled_from([0.0, 0.1])),
        interruptible=draw(st.booleans()),
    )
    times_s = st.floats(0.0, 0.3)
    requests = tuple(
        Request(
            request_id=f"r{index}",
            num_prompt_tokens=draw(st.one_of(st.integers(0, 12), st.integers(1, 120))),
            max_output_tokens=draw(st.integers(1, 12)),
            arrival_s=draw(times_s),
            ttft_slo_s=draw(st.sampled_from([None, None, 0.005, 10.0])),
            tpot_slo_s=draw(st.sampled_from([None, None, 0.001])),
            priority=draw(st.sampled_from([0, 0, 1])),
        )
        for index in range(draw(st.integers(1, 18)))
    )
    ids = [request.request_id for request in requests]
    return Case(
        config=config,
        memory={
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_context_len": SHAPE.max_context_len,
            "kvp": kvp,
            "max_tokens_per_shard": None if shard_blocks is None else shard_blocks * block_size,
        },
        spp=draw(st.integers(1, 3)),
        requests=requests,
        aborts=tuple(draw(st.lists(st.tuples(times_s, st.sampled_from(ids)), max_size=4))),
        losses_s=tuple(draw(st.lists(times_s, max_size=2))),
        stop_rate=draw(st.sampled_from([0.0, 0.1])),
        fail_rate=draw(st.sampled_from([0.0, 0.05])),
        learns=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@dataclass
class Seen:
    """What the ranks and the client of one request know."""

    request: Request
    blocks: dict[int, list[int]] = field(default_factory=dict)  # by KVP rank, as the operations told it
    kvp_ranks: tuple[int, ...] = ()
    num_scheduled: int = 0
    num_tokens_out: int = 0
    in_flight: dict[int, Chunk] = field(default_factory=dict)  # by batch id
    has_ended: bool = False
    is_released: bool = False

    def lose_kv(self) -> None:
        """The ranks still have its blocks, until they hear of it."""
        self.kvp_ranks, self.num_scheduled = (), 0


class Audit:
    """An Observer that asserts every promise at every event and every batch."""

    def __init__(self, case: Case, scheduler: Scheduler) -> None:
        self.case = case
        self.scheduler = scheduler
        memory = scheduler.memory
        self.shard_tokens = memory.max_tokens_per_shard or memory.num_blocks * memory.block_size
        self.seen: dict[str, Seen] = {}
        self.past_first_stage: set[int] = set()
        self.in_flight: dict[int, Batch] = {}
        self.num_overtakings = 0
        self.num_batches = 0
        self.num_preempted = 0

    def handled(self, event: Event, outputs: Items[Output], now_s: float) -> None:
        match event:
            case Arrived(request):
                self.seen[request.request_id] = Seen(request)
            case FirstStageDone(batch_id):
                self.past_first_stage.add(batch_id)
            case Completed():
                del self.in_flight[event.batch_id]
                for seen in self.seen.values():
                    seen.in_flight.pop(event.batch_id, None)
            case Aborted(request_id):
                if request_id in self.seen:
                    self.seen[request_id].has_ended = True
            case RanksLost():
                self.in_flight.clear()
                for seen in self.seen.values():
                    seen.in_flight.clear()
                    seen.lose_kv()
                    seen.blocks = {}
        for output in outputs:
            self._output(output, event)
        self._blocks_are_free_or_owned_once()
        self._cursors_are_ordered()

    def _output(self, output: Output, event: Event) -> None:
        seen = self.seen[output.request_id]
        assert not seen.has_ended, f"{output} after the end"
        match output:
            case TokenOut():
                assert isinstance(event, Completed) and output.batch_id == event.batch_id
                seen.num_tokens_out += 1
                is_last = seen.num_tokens_out == seen.request.max_output_tokens
                if output.finish_reason is None:
                    assert not is_last and output.request_id not in event.stopped
                else:
                    seen.has_ended = True
                    stops = output.request_id in event.stopped
                    assert output.finish_reason is (FinishReason.STOP if stops else FinishReason.LENGTH)
                    assert stops or is_last
            case Rejected():
                seen.has_ended = True
                assert output.is_client_fault == isinstance(event, Arrived)
            case Preempted():
                assert not seen.in_flight
                assert output.num_tokens_lost == seen.num_scheduled
                self.num_preempted += 1
                seen.lose_kv()

    def scheduled(self, batch: Batch, now_s: float) -> None:
        self.num_batches += 1
        assert batch.chunks and len({chunk.request_id for chunk in batch.chunks}) == len(batch.chunks)
        for request_id in batch.released:
            seen = self.seen[request_id]
            assert seen.has_ended and not seen.in_flight and not seen.is_released
            seen.is_released = True
        self._overtakes(batch)
        self.in_flight[batch.batch_id] = batch
        for op in batch.kv_ops:
            self._execute(op)
        for chunk in batch.chunks:
            self._chunk_follows(chunk, batch.batch_id)
        for rank in range(self.scheduler.memory.kvp):
            num_tokens = sum(chunk.num_tokens for chunk in batch.chunks_on(rank))
            assert num_tokens <= self.case.config.max_batch_tokens
        num_owners = sum(bool(seq.block_table.shards) for seq in self.scheduler.sequences)
        assert num_owners == self.scheduler.memory.num_owners <= self.case.config.max_num_sequences
        self._keeps_budget(batch)
        self._blocks_are_free_or_owned_once()
        self._ranks_know_the_tables(batch)
        self._cursors_are_ordered()

    def _overtakes(self, batch: Batch) -> None:
        """At most one overtakes at a time, one that may be held, and nothing that those it passes compute or change."""
        others = self.in_flight.values()
        if batch.overtakes is None:
            assert all(other.batch_id in self.past_first_stage for other in others)
            assert sum(other.overtakes is None for other in others) < self.case.spp
        else:
            self.num_overtakings += 1
            assert self.case.config.interruptible and not batch.may_be_held
            assert all(other.overtakes is None and other.batch_id >= batch.overtakes for other in others)
            assert all(other.may_be_held for other in others if other.batch_id not in self.past_first_stage)
            assert any(other.may_be_held for other in others)
            passed = {chunk.request_id for other in others for chunk in other.chunks}
            changed = {op.request_id for other in others for op in other.kv_ops}
            own = {chunk.request_id for chunk in batch.chunks} | {op.request_id for op in batch.kv_ops}
            assert not own & passed and not own & changed
        if batch.may_be_held:
            sequences = [self.scheduler.sequence(chunk.request_id) for chunk in batch.chunks]
            assert all(seq is not None and seq.status is Status.PREFILLING for seq in sequences)
        in_use = {
            (shard.kvp_rank, block)
            for other in others
            for chunk in other.chunks
            for seq in [self.scheduler.sequence(chunk.request_id)]
            if seq is not None
            for shard in seq.block_table.shards
            for first, count in shard.extents
            for block in range(first, first + count)
        }
        for op in batch.kv_ops:
            blocks = {(op.kvp_rank, b) for first, count in op.extents for b in range(first, first + count)}
            assert not blocks & in_use or op.request_id in {c.request_id for o in others for c in o.chunks}

    def _execute(self, op: KVOp) -> None:
        seen = self.seen[op.request_id]
        if op.kind == "drop":
            assert not seen.in_flight and not seen.num_scheduled and seen.blocks
            seen.blocks = {}
        else:
            assert op.kind == "append" and not seen.has_ended
            seen.blocks.setdefault(op.kvp_rank, []).extend(
                block for first, count in op.extents for block in range(first, first + count)
            )

    def _chunk_follows(self, chunk: Chunk, batch_id: int) -> None:
        seen = self.seen[chunk.request_id]
        memory = self.scheduler.memory
        assert not seen.has_ended and chunk.num_tokens > 0
        assert chunk.start == seen.num_scheduled, "chunks are contiguous from 0"
        num_known = seen.request.num_prompt_tokens + seen.num_tokens_out
        end = chunk.start + chunk.num_tokens
        assert end <= num_known and chunk.samples_token == (end == num_known)
        for other_id, other in seen.in_flight.items():
            assert other_id in self.past_first_stage, "a prompt's next chunk waits until the last has left stage 0"
            assert not other.samples_token, "a decode needs the token before it"
        seen.in_flight[batch_id] = chunk
        seen.num_scheduled = end
        assert chunk.kvp_ranks[: len(seen.kvp_ranks)] == seen.kvp_ranks
        assert len(set(chunk.kvp_ranks)) == len(chunk.kvp_ranks)
        seen.kvp_ranks = chunk.kvp_ranks
        shard_start = (len(chunk.kvp_ranks) - 1) * self.shard_tokens
        assert shard_start <= chunk.start and end <= shard_start + self.shard_tokens, "a chunk crosses a shard's end"
        blocks = seen.blocks[chunk.kvp_ranks[-1]]
        assert len(blocks) * memory.block_size >= end - shard_start, "tokens without blocks"

    def _ranks_know_the_tables(self, batch: Batch) -> None:
        tables = {seq.request_id: seq.block_table for seq in self.scheduler.sequences}
        for chunk in batch.chunks:
            owned = {
                shard.kvp_rank: [b for first, count in shard.extents for b in range(first, first + count)]
                for shard in tables[chunk.request_id].shards
            }
            assert self.seen[chunk.request_id].blocks == owned

    def _blocks_are_free_or_owned_once(self) -> None:
        for rank, pool in enumerate(self.scheduler.memory.pools):
            blocks = [b for first, count in pool.free_extents for b in range(first, first + count)]
            assert len(blocks) == pool.num_free_blocks
            for seq in self.scheduler.sequences:
                for shard in seq.block_table.shards:
                    if shard.kvp_rank == rank:
                        blocks.extend(b for first, count in shard.extents for b in range(first, first + count))
            assert sorted(blocks) == list(range(pool.num_blocks))

    def _cursors_are_ordered(self) -> None:
        for seq in self.scheduler.sequences:
            cursors = (
                0, seq.num_computed_tokens, seq.num_first_stage_tokens, seq.num_scheduled_tokens, seq.num_known_tokens
            )  # fmt: skip
            assert list(cursors) == sorted(cursors)
            assert seq.num_batches_in_flight == len(self.seen[seq.request_id].in_flight)
            assert seq.is_waiting == (not seq.block_table.shards), "who waits owns nothing"

    def _keeps_budget(self, batch: Batch) -> None:
        """Beyond the budget only by decodes, which all run, or by one tile, which keeps the most urgent moving."""
        if self.case.config.chunking is not Chunking.ADAPTIVE:
            return
        for rank in range(self.scheduler.memory.kvp):
            chunks = batch.chunks_on(rank)
            if self._rank_s(chunks, rank) <= batch.budget_s * (1 + 1e-9):
                continue
            prefills = [chunk for chunk in chunks if not self._is_decode(chunk)]
            assert len([c for c in prefills if c.num_tokens <= self.case.config.tile_tokens]) <= 1, prefills
            rest = [c for c in prefills if c.num_tokens > self.case.config.tile_tokens]
            decodes = [chunk for chunk in chunks if self._is_decode(chunk)]
            assert not rest or self._rank_s((*decodes, *rest), rank) <= batch.budget_s * (1 + 1e-9), prefills

    def _rank_s(self, chunks: Items[Chunk], rank: int) -> float:
        load, cost = StepLoad(), self.scheduler.cost
        for chunk in chunks:
            index = chunk.kvp_ranks.index(rank)
            is_last = index == len(chunk.kvp_ranks) - 1
            context = chunk.start - index * self.shard_tokens if is_last else self.shard_tokens
            if self._is_decode(chunk):
                load.add_decodes(1, context + 1, cost.decode_attention_s(context + 1))
            else:
                load.add_chunk(context, chunk.num_tokens, cost.attention_s(context, chunk.num_tokens))
        return step_s(cost, load)

    def _is_decode(self, chunk: Chunk) -> bool:
        """The last token of a prompt may be a chunk of its own: it is planned, and costs, as one."""
        seq = self.scheduler.sequence(chunk.request_id)
        return seq is not None and seq.status is Status.DECODING


def scheduler_of(case: Case) -> Scheduler:
    layout_cost = RooflineCost(shape=SHAPE, hardware=HARDWARE)
    cost = OnlineCost(layout_cost) if case.learns else layout_cost
    memory = KVMemory(**case.memory, watermark=case.config.watermark)  # type: ignore[arg-type]
    return Scheduler(case.config, cost, memory, case.spp)


def run(case: Case, *observers: Observer) -> tuple[Scheduler, Audit]:
    scheduler = scheduler_of(case)
    draw = random.Random(case.seed)

    def outcome(batch: Batch, duration_s: float) -> Completed:
        ids = [chunk.request_id for chunk in batch.chunks]
        return Completed(
            batch_id=batch.batch_id,
            duration_s=duration_s,
            stopped=tuple(i for i in ids if draw.random() < case.stop_rate),
            failed=tuple((i, "injected") for i in ids if draw.random() < case.fail_rate),
        )

    world = RecordingSimRuntime(
        case.requests, lambda batch: batch.predicted_s * draw.uniform(0.5, 1.5), case.spp, outcome, pipeline_of(case)
    )
    world.wakes_at_s = scheduler.wakes_at_s
    for at_s, request_id in case.aborts:
        world.abort(at_s, request_id)
    for at_s in case.losses_s:
        world.lose_ranks(at_s)
    audit = Audit(case, scheduler)
    serve(scheduler, world, (audit, *observers))
    return scheduler, audit


def pipeline_of(case: Case) -> Pipeline:
    if not case.config.interruptible:
        return Pipeline(case.spp)
    return InterruptiblePipeline(case.spp, 1, None, (2,) * case.spp, lambda num_tokens: 1e-4)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_request_ends_once_and_nothing_is_lost_leaked_or_shared(case: Case) -> None:
    scheduler, audit = run(case)
    assert all(seen.has_ended for seen in audit.seen.values())
    assert len(audit.seen) == len(case.requests)
    assert not list(scheduler.sequences) and not scheduler.num_batches_in_flight
    memory = scheduler.memory
    assert [pool.free_extents for pool in memory.pools] == [((0, memory.num_blocks),)] * memory.kvp
    assert memory.num_owners == 0


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_run_in_which_batches_are_held_replays_to_the_same_batches(case: Case) -> None:
    config = replace(case.config, interruptible=True, step_budget_s=0.01, chunking=Chunking.ADAPTIVE)
    case = replace(case, config=config, learns=False)
    stream = io.StringIO()
    _, audit = run(case, DecisionLog(stream, {"config": {}}))
    _, records = read_log(stream.getvalue().splitlines())
    assert replay(records, scheduler_of(case)) == audit.num_batches


def test_random_runs_hold_batches_often_enough_to_be_a_test_of_it() -> None:
    num_overtakings = 0
    for seed in range(9):
        draw = random.Random(seed)
        requests = tuple(
            Request(
                request_id=f"r{index}", num_prompt_tokens=draw.choice((5, 8, 12, 380)),
                max_output_tokens=draw.choice((1, 15)), arrival_s=draw.uniform(0.0, 8.0),
            )
            for index in range(60)
        )  # fmt: skip
        case = Case(
            SchedulerConfig(interruptible=True, step_budget_s=0.02, tile_tokens=4, min_deadline_s=0.1),
            {"num_blocks": 2000, "block_size": 4, "max_context_len": 400},
            1 + seed % 3, requests, (), (), 0.05, 0.0, False, seed,
        )  # fmt: skip
        num_overtakings += run(case)[1].num_overtakings
    assert num_overtakings > 50
