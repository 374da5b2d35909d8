"""Plays a random schedule on real ranks, in virtual time, and keeps the answer to each request.

What a step took is drawn, and so is which stage is done first: a play is the same however busy the machine is.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from megatron_medha.bits.random_schedule import BLOCK_SIZE, RandomSchedule, Turn
from megatron_medha.bits.rank_processes import Prepare, RankProcesses
from megatron_medha.cluster.messages import NewRequest, StepDone
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.rank_state import RankStateCache
from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    Event,
    FirstStageDone,
    Output,
    Preempted,
    Rejected,
    TokenOut,
    Woken,
)  # fmt: skip
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.prefix_keys import GranuleKeys, root_key
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.core.scheduling.scheduler import Scheduler

ROOT = root_key(b"of these plays", "model")
# So slow that budgets bind with prompts of a few dozen tokens.
SLOW = Hardware(name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4, layer_overhead_s=2e-5)
SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=400,
)  # fmt: skip


class Place(NamedTuple):
    """Ranks to play on."""

    ranks: RankProcesses
    checkpoint: Path
    layout: ParallelLayout
    model: ModelOptions  # kernels named, so that every play takes the same
    kv_memory_bytes: int = 64 << 20
    kv: KVConfig | None = None  # of ranks that stay loaded for many plays; None: each play loads its own


@dataclass
class Told:
    """The answer to a request."""

    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position
    num_cached_tokens: int = 0
    has_ended: bool = False


class Play:
    """One case, from its first request to its last token. `told` by request id, `counts`, and `notes` of `prepare`."""

    def __init__(self, case: RandomSchedule, place: Place, *, has_cache: bool, prepare: Prepare | None = None) -> None:
        self.case, self.ranks, self.layout = case, place.ranks, place.layout
        kv = case.kv if has_cache else replace(case.kv, prefix_cache=False)
        ready, *_ = self.ranks.load(
            RankConfig(
                layout=self.layout, server_endpoint="", checkpoint=str(place.checkpoint), model=place.model,
                kv_memory_bytes=place.kv_memory_bytes, max_tokens_per_shard=case.shard_tokens, kv=place.kv or kv,
            ),
            prepare,
            keeps_logits=False,
            is_kept=place.kv is not None,
        )  # fmt: skip
        assert ready.num_blocks >= case.num_blocks
        self.memory = KVMemory(
            case.num_blocks, BLOCK_SIZE, case.max_context_len, kvp=self.layout.kvp,
            max_tokens_per_shard=case.shard_tokens, watermark=0.0, kv=kv,
        )  # fmt: skip
        cost = RooflineCost(shape=SHAPE, hardware=SLOW)
        self.scheduler = Scheduler(case.scheduler, cost, self.memory, spp=self.layout.spp)
        self.rng = random.Random(case.seed)
        self.now_s = 0.0
        self.told: dict[str, Told] = {}
        self.notes: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self._turns = {turn.request_id: turn for turn in case.turns}
        prompts = Counter((turn.after, turn.new_tokens) for turn in case.turns)
        self._repeated = {t.request_id for t in case.turns if prompts[t.after, t.new_tokens] > 1}
        self._due = {turn.request_id: turn.delay_s for turn in case.turns if turn.after is None}
        self._aborts: dict[str, int] = {}      # by request: the batch it is aborted at
        self._keys: dict[str, GranuleKeys] = {}
        self._rank_state = RankStateCache(self.layout, self._new_request)
        self._first_batch = self.ranks.num_batches  # what ranks call the first one: their numbers go on
        self._batches: dict[int, Batch] = {}
        self._in_first_stage: list[int] = []
        self._done: dict[tuple[int, int], list[StepDone]] = {}  # by batch and stage
        self._preempted: set[str] = set()
        self._sampled: dict[str, tuple[int, TokenLogprobs | None]] = {}

    def run(self) -> Play:
        """To the end. Raises AssertionError on a deadlock or wrong accounting."""
        while self._due or self.scheduler.num_sequences:
            if not self._batches and self._due:
                self.now_s = max(self.now_s, min(self._due.values()))
            for request_id in [name for name, due_s in self._due.items() if due_s <= self.now_s]:
                del self._due[request_id]
                self._arrive(self._turns[request_id])
            for request_id in [n for n, batch in self._aborts.items() if self.counts["steps"] >= batch]:
                del self._aborts[request_id]
                if not self.told[request_id].has_ended:
                    self.counts["aborts"] += 1
                    self.told[request_id].has_ended = True
                    self._keys.pop(request_id, None)
                    self._handle(Aborted(request_id))
            while (batch := self.scheduler.schedule(self.now_s)) is not None:
                self._submit(batch)
            assert self._batches or self._due or not self.scheduler.num_sequences, "live requests, and no batch"
            if self._batches and not self._looks_again():
                self._advance()
        return self

    def _looks_again(self) -> bool:
        """Whether the time of another arrival, or of a wish of the scheduler, has come while a batch may be held."""
        newest = next(reversed(self._batches.values()))
        wakes_s = min([self.scheduler.wakes_at_s(), *self._due.values()])
        if not newest.may_be_held or not self.now_s < wakes_s < newest.created_s + newest.predicted_s:
            return False
        self.now_s = wakes_s
        self._handle(Woken())
        return True

    def _arrive(self, turn: Turn) -> None:
        before = self.told[turn.after] if turn.after else Told()
        prompt = before.prompt + before.tokens + list(turn.new_tokens)
        self.told[turn.request_id] = Told(prompt)
        prefix_keys = b""
        if turn.is_cached and self.memory.cache is not None:
            keys = self._keys[turn.request_id] = GranuleKeys(ROOT, self.memory.cache.granule_tokens)
            prefix_keys = keys.extend(array("i", prompt))
        if turn.abort_after is not None:
            self._aborts[turn.request_id] = self.counts["steps"] + turn.abort_after
        self.counts["requests"] += 1
        self._handle(
            Arrived(
                Request(
                    request_id=turn.request_id, num_prompt_tokens=len(prompt), arrival_s=self.now_s,
                    max_output_tokens=turn.sampling.max_output_tokens, prefix_keys=prefix_keys,
                    reads_cache=turn.sampling.num_prompt_logprobs is None, session_id=turn.session_id,
                )
            )
        )  # fmt: skip

    def _submit(self, batch: Batch) -> None:
        self.counts["steps"] += 1
        self._batches[batch.batch_id] = batch
        for chunk in batch.chunks:
            if chunk.request_id in self._preempted:
                self._preempted.remove(chunk.request_id)
                self.counts["hits after preemption"] += chunk.start > 0
        self.counts["overtaking"] += batch.overtakes is not None
        if self.layout.spp > 1:
            self._in_first_stage.append(batch.batch_id)
        self.ranks.num_batches += 1
        overtakes = None if batch.overtakes is None else batch.overtakes + self._first_batch
        for kvp, step in enumerate(self._rank_state.steps(batch)):
            sent = msgspec.structs.replace(step, batch_id=step.batch_id + self._first_batch, overtakes=overtakes)
            self.ranks.send_to_kvp_rank(kvp, sent)

    def _new_request(self, request_id: str) -> NewRequest:
        told = self.told[request_id]
        token_ids = array("i", told.prompt + told.tokens)
        return NewRequest(request_id, token_ids.tobytes(), len(told.prompt), self._turns[request_id].sampling)

    def _advance(self) -> None:
        batch_id = self._next_done()
        if batch_id in self._in_first_stage:
            self._in_first_stage.remove(batch_id)
            self._answers(batch_id, 0)
            self._handle(FirstStageDone(batch_id))
        else:
            self._complete(batch_id)

    def _next_done(self) -> int:
        """The batch that has got on: the oldest, one that overtakes it, or the first on the first stage."""
        oldest, *others = self._batches
        overtaking = [batch_id for batch_id in others if self._batches[batch_id].overtakes is not None]
        if overtaking and self.rng.random() < 0.5:
            return overtaking[0]
        if self._in_first_stage and self.rng.random() < 0.5:
            return self._in_first_stage[0]
        return oldest

    def _answers(self, batch_id: int, stage: int) -> list[StepDone]:
        """Of all kvp ranks of a stage."""
        found = self._done.setdefault((batch_id, stage), [])
        while len(found) < self.layout.kvp:
            for answer in self.ranks.answers():
                coord = self.layout.coord_of(answer.done.rank)
                self.notes.update(answer.notes)
                answered = answer.done.batch_id - self._first_batch
                self._done.setdefault((answered, coord.spp), []).append(answer.done)
        return found

    def _complete(self, batch_id: int) -> None:
        answers = self._answers(batch_id, self.layout.spp - 1)
        batch = self._batches.pop(batch_id)
        filled, stopped = [], []
        for done in answers:
            assert not done.failed, done.failed
            for part in done.prompt_logprobs:
                self.told[part.request_id].prompt_logprobs.update(enumerate(part.logprobs, part.first_position))
            for token in done.tokens:
                self._sampled[token.request_id] = (token.token_id, token.logprobs)
                if token.is_stop:
                    stopped.append(token.request_id)
                keys = self._keys.get(token.request_id)
                if keys is not None and (key := keys.append(token.token_id)):
                    filled.append((token.request_id, key))
        duration_s = self.rng.choice((0.5, 1.0, 2.0)) * batch.predicted_s
        self.now_s += duration_s
        self.counts["granules filled by decodes"] += len(filled)
        self._handle(Completed(batch_id, duration_s, tuple(stopped), filled_keys=tuple(filled)))
        self._check_accounting()

    def _handle(self, event: Event) -> None:
        for output in self.scheduler.handle(event, self.now_s):
            self._tell(output)

    def _tell(self, output: Output) -> None:
        match output:
            case TokenOut(request_id, _, finish_reason, num_cached_tokens):
                told = self.told[request_id]
                token_id, logprobs = self._sampled.pop(request_id)
                assert logprobs is not None
                told.tokens.append(token_id)
                told.logprobs.append(logprobs)
                if len(told.tokens) == 1:
                    self._note_hit(self._turns[request_id], told, num_cached_tokens)
                if finish_reason is not None:
                    self._end(request_id)
                else:
                    self._rank_state.sampled(request_id, token_id)
            case Preempted(request_id):
                self.counts["preempted"] += 1
                self._preempted.add(request_id)
            case Rejected(request_id, why):
                raise AssertionError(f"{request_id}: {why}")

    def _note_hit(self, turn: Turn, told: Told, num_cached_tokens: int) -> None:
        told.num_cached_tokens = num_cached_tokens
        self.counts["hit tokens"] += num_cached_tokens
        self.counts["hits"] += num_cached_tokens > 0
        repeated = turn.request_id in self._repeated
        self.counts["hits of repeated prompts"] += repeated and num_cached_tokens > 0
        if turn.after is not None and num_cached_tokens > len(self.told[turn.after].prompt):
            self.counts["hits on decodes"] += 1

    def _end(self, request_id: str) -> None:
        self.told[request_id].has_ended = True
        self._keys.pop(request_id, None)
        self._aborts.pop(request_id, None)
        for turn in self.case.turns:
            if turn.after == request_id:
                self._due[turn.request_id] = self.now_s + turn.delay_s

    def _check_accounting(self) -> None:
        cache = self.memory.cache
        if cache is None:
            return
        tables = [seq.block_table for seq in self.memory.owners.values()]
        owned = [
            (0, shard.kvp_rank, cache.index.own_extents(holding, shard.extents))
            for table in tables
            for shard, holding in zip(table.shards, table.holdings, strict=True)
        ]
        check(cache.index, [holding for table in tables for holding in table.holdings], owned)
