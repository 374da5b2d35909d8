"""Ranks whose blocks hold, token by token, which prefix their KV is of: a wrong hit or a block lost shows at once.

Also random worlds of requests with common prefixes to run over them.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.lib.recording_runtime import RecordingSimRuntime
from megatron_medha.core.batch import Aborted, Arrived, Batch, Chunk, Completed, Event, Output, RanksLost, TokenOut
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

BLOCK, GRANULE = 4, 8
ROOT = b"r" * 32
NAN = -1  # what a faulty request computes, and all who read it
SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=400,
)  # fmt: skip
HARDWARE = Hardware(name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4, layer_overhead_s=2e-5)


@dataclass
class Content:
    """What ranks and client have of one request."""

    tokens: list[int]
    keys: GranuleKeys | None  # None: it is not cached
    prefixes: list[int] = field(default_factory=list)  # by position: of all tokens up to it
    tables: dict[int, list[int]] = field(default_factory=dict)  # blocks by KVP rank
    fails_from: int | None = None  # position from which on it computes no numbers
    is_ruined: bool = False
    num_cached: int | None = None

    def prefix(self, position: int) -> int:
        """Which prefix ends there."""
        while len(self.prefixes) <= position:
            before = self.prefixes[-1] if self.prefixes else 0
            self.prefixes.append(hash((before, self.tokens[len(self.prefixes)])) & (1 << 60) - 1)
        return self.prefixes[position]


class ContentWorld:
    """An Observer: plays the ranks at every batch, and checks the accounting after every event."""

    def __init__(self, scheduler: Scheduler, prompts: dict[str, list[int]], faulty: dict[str, int]) -> None:
        self.scheduler = scheduler
        self.memory = scheduler.memory
        self.prompts, self.faulty = prompts, faulty
        self.live: dict[str, Content] = {}
        self.slots: list[dict[int, int]] = [{} for _ in range(self.memory.kvp)]  # by rank: slot -> prefix
        self.samples: dict[int, list[str]] = {}  # requests that sample, by batch in flight
        self.num_awaiting = self.num_prompt_hits = self.num_batches = 0
        self.outputs: dict[str, list[int]] = {}

    # ---- the ranks ----

    def scheduled(self, batch: Batch, now_s: float) -> None:
        self.num_batches += 1
        for request_id in batch.released:
            self.live.pop(request_id, None)
        for op in batch.kv_ops:
            content = self.live[op.request_id]
            if op.kind == "drop":
                content.tables = {}
            else:
                table = content.tables.setdefault(op.kvp_rank, [])
                table += [block for first, count in op.extents for block in range(first, first + count)]
        for chunk in batch.chunks:
            self._compute(chunk)
        self.samples[batch.batch_id] = [chunk.request_id for chunk in batch.chunks if chunk.samples_token]
        self.check()

    def _compute(self, chunk: Chunk) -> None:
        content = self.live[chunk.request_id]
        end = chunk.start + chunk.num_tokens
        assert end <= len(content.tokens) and chunk.samples_token == (end == len(content.tokens))
        for position in range(chunk.start):
            rank = chunk.kvp_ranks[position // self.memory.shard_tokens]
            found = self.slots[rank].get(self._slot(content, chunk, position))
            content.is_ruined |= found == NAN
            assert found in (NAN, content.prefix(position)), f"{chunk}: position {position} is not there"
        for position in range(chunk.start, end):
            is_bad = content.is_ruined or content.fails_from is not None and position >= content.fails_from
            content.is_ruined = is_bad
            rank = chunk.kvp_ranks[position // self.memory.shard_tokens]
            self.slots[rank][self._slot(content, chunk, position)] = NAN if is_bad else content.prefix(position)

    def _slot(self, content: Content, chunk: Chunk, position: int) -> int:
        shard, within = divmod(position, self.memory.shard_tokens)
        block, offset = divmod(within, BLOCK)
        return content.tables[chunk.kvp_ranks[shard]][block] * BLOCK + offset

    def completed(self, batch: Batch, seconds: float) -> Completed:
        """How a batch ends; asked for when it is submitted."""
        failed, filled = [], []
        for request_id in self.samples[batch.batch_id]:
            content = self.live[request_id]
            if content.is_ruined:
                failed.append((request_id, "not a number"))
            else:
                token = hash((content.prefix(len(content.tokens) - 1), "next")) % 7
                if content.keys and (key := content.keys.copy().extend(array("i", [token]))):
                    filled.append((request_id, key))
        return Completed(batch.batch_id, seconds, (), tuple(failed), tuple(filled))

    # ---- the client ----

    def handled(self, event: Event, outputs: Items[Output], now_s: float) -> None:
        match event:
            case Arrived(request):
                name = request.request_id
                keys: GranuleKeys | None = GranuleKeys(ROOT, GRANULE)
                assert keys
                if keys.extend(array("i", self.prompts[name])) != request.prefix_keys:
                    keys = None
                self.live[name] = Content(list(self.prompts[name]), keys, fails_from=self.faulty.get(name))
            case RanksLost():
                self.samples.clear()
                for slots in self.slots:
                    slots.clear()
                for content in self.live.values():
                    content.tables, content.is_ruined = {}, False
            case _:
                pass
        for output in outputs:
            if isinstance(output, TokenOut):
                content = self.live[output.request_id]
                token = hash((content.prefix(len(content.tokens) - 1), "next")) % 7
                content.tokens.append(token)
                if content.keys:
                    content.keys.extend(array("i", [token]))
                self.outputs.setdefault(output.request_id, []).append(token)
                if content.num_cached is None:
                    content.num_cached = output.num_cached_tokens
                    self.num_prompt_hits += output.num_cached_tokens
        self.check()

    def check(self) -> None:
        """Every block is free, owned or cached once; who waits stands behind what is cached of it."""
        cache, memory = self.memory.cache, self.memory
        assert cache is not None
        holdings = [holding for seq in memory.owners.values() for holding in seq.block_table.holdings]
        owned = [
            (0, shard.kvp_rank, cache.index.own_extents(holding, shard.extents))
            for seq in memory.owners.values()
            for shard, holding in zip(seq.block_table.shards, seq.block_table.holdings, strict=True)
        ]
        check(cache.index, holdings, owned)
        self.num_awaiting += len(self.scheduler._prefixes.siblings._awaited)
        for seq in self.scheduler.sequences:
            cursors = (0, seq.num_computed_tokens, seq.num_first_stage_tokens, seq.num_scheduled_tokens)
            assert list(cursors) == sorted(cursors) and seq.num_scheduled_tokens <= seq.num_known_tokens
            assert len(seq.keys) // 16 <= seq.num_known_tokens // GRANULE
            assert seq.is_waiting == (not seq.block_table.shards)
            if seq.is_waiting and not seq.is_done:
                assert seq.num_scheduled_tokens == seq.num_cached_tokens < seq.num_known_tokens
                if memory.kvp == 1 and seq.keys and self.scheduler._prefixes.is_current(seq):
                    match = cache.longest(seq)
                    assert seq.num_cached_tokens == (0 if match is None else match.end) * GRANULE

    def assert_drained(self) -> None:
        """Everything has ended, and what is left in the cache is right."""
        assert not list(self.scheduler.sequences) and not self.scheduler.num_batches_in_flight
        memory = self.memory
        assert memory.num_free_blocks == memory.kvp * memory.num_blocks and not memory.num_owners
        assert memory.cache is not None
        for rank, tree in enumerate(memory.cache.index.trees[0]):
            for segment in tree.heads.values():
                assert not segment.waiters
                for first, count in segment.extents:
                    slots = range(first * BLOCK, (first + count) * BLOCK)
                    is_good = all(self.slots[rank].get(slot, NAN) != NAN for slot in slots)
                    assert is_good or not segment.is_proven, "what failed is cached"


def keys_of(tokens: list[int]) -> bytes:
    return GranuleKeys(ROOT, GRANULE).extend(array("i", tokens))


@dataclass
class Case:
    """A random world."""

    config: SchedulerConfig
    num_blocks: int
    kvp: int
    shard_tokens: int | None
    spp: int
    requests: list[Request]
    prompts: dict[str, list[int]]
    faulty: dict[str, int]
    aborts: list[tuple[float, str]]
    losses_s: list[float]
    seed: int
    kv: KVConfig = KVConfig(granule_tokens=GRANULE)


def random_case(seed: int, *, kvp: int, spp: int, **config: Any) -> Case:
    """Requests with common prefixes, some of which continue the output of another; little memory."""
    draw = random.Random(seed)
    stems = [[draw.randrange(100) for _ in range(draw.choice((8, 30, 60, 100)))] for _ in range(3)]
    requests, prompts = [], {}
    for index in range(draw.randint(6, 24)):
        stem = draw.choice(stems)
        tokens = stem[: draw.randint(1, len(stem))] if draw.random() < 0.7 else list(stem)
        tokens += [draw.randrange(100) for _ in range(draw.choice((0, 0, 1, 5, 20)))]
        if draw.random() < 0.2:
            stems.append(tokens)
        name = f"r{index}"
        prompts[name] = tokens
        requests.append(
            Request(
                request_id=name, num_prompt_tokens=len(tokens), max_output_tokens=draw.choice((1, 3, 12, 30)),
                arrival_s=draw.uniform(0.0, 0.3), priority=draw.choice((0, 0, 0, 1)),
                ttft_slo_s=draw.choice((None, None, 0.005, 10.0)),
                prefix_keys=b"" if draw.random() < 0.1 else keys_of(tokens), reads_cache=draw.random() > 0.1,
                session_id=draw.choice(("", "s", "t")), ends_session=draw.random() < 0.1,
            )
        )  # fmt: skip
    names = list(prompts)
    num_blocks = draw.choice((40, 60, 120))
    least_granules = -(-160 // (GRANULE * kvp))
    return Case(
        config=SchedulerConfig(
            **{
                "step_budget_s": draw.choice((2e-3, 0.01, 0.05)), "tile_tokens": draw.choice((1, 4, 8)),
                "max_batch_tokens": draw.choice((24, 400)), "max_num_sequences": draw.randint(1, 12),
                "min_deadline_s": draw.choice((1e-3, 0.5)), "progress_share": draw.choice((0.0, 0.1, 0.5)),
                "watermark": draw.choice((0.0, 0.1)), "max_skips": draw.choice((0, 10)), **config,
            }
        ),
        num_blocks=num_blocks,
        kvp=kvp,
        shard_tokens=None if kvp == 1 else GRANULE * draw.randint(least_granules, num_blocks * BLOCK // GRANULE),
        spp=spp,
        requests=requests,
        prompts=prompts,
        faulty={name: draw.randrange(60) for name in names if draw.random() < 0.1},
        aborts=[(draw.uniform(0.0, 0.4), draw.choice(names)) for _ in range(draw.randint(0, 4))],
        losses_s=[draw.uniform(0.0, 0.4)] if draw.random() < 0.3 else [],
        seed=seed,
    )  # fmt: skip


def run(case: Case) -> ContentWorld:
    """From the first arrival until all have ended."""
    draw = random.Random(case.seed)
    memory = KVMemory(
        num_blocks=case.num_blocks, block_size=BLOCK, max_context_len=SHAPE.max_context_len, kvp=case.kvp,
        max_tokens_per_shard=case.shard_tokens, watermark=case.config.watermark, kv=case.kv,
    )  # fmt: skip
    scheduler = Scheduler(case.config, RooflineCost(shape=SHAPE, hardware=HARDWARE), memory, case.spp)
    content = ContentWorld(scheduler, case.prompts, case.faulty)
    world = RecordingSimRuntime(
        case.requests, lambda batch: batch.predicted_s * draw.uniform(0.5, 1.5), case.spp, content.completed
    )
    for at_s, name in case.aborts:
        world.abort(at_s, name)
    for at_s in case.losses_s:
        world.lose_ranks(at_s)
    serve(scheduler, world, (content,))
    return content


def without_cache(case: Case) -> Case:
    return replace(case, requests=[replace(request, prefix_keys=b"") for request in case.requests])


__all__ = ["Aborted", "Case", "ContentWorld", "keys_of", "random_case", "run", "without_cache"]
