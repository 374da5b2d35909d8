"""Short conversations, the same for all layouts, and random schedules of them that differ from layout to layout.

Sequences are of at most 128 tokens, and cross blocks, chunks and shards all the same: these are as short.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from megatron_medha.bits.random_schedule import BLOCK_SIZE, RandomSchedule, Turn
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.overtaking import resolved
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

MAX_TOKENS = 128
NUM_TOP = 5  # log-probabilities of the best tokens, at every position
_SHARD_TOKENS = {1: MAX_TOKENS, 2: 64, 3: 48, 4: 32}  # by kvp
_NUM_TURNS = 8
_MAX_OUTPUTS = 10
_MAX_NEW = 52


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What prompts and outputs of a model are made of."""

    size: int
    stop_token_id: int
    grammars: tuple[str, ...]  # outputs may have to match one; none: the model has no tokenizer


def shard_tokens(kvp: int) -> int:
    """Of a sequence on one of so many kvp ranks."""
    return _SHARD_TOKENS[kvp]


def conversations(seed: int, vocabulary: Vocabulary) -> tuple[Turn, ...]:
    """Requests that continue, repeat and fork one another; of a seed always the same."""
    rng = random.Random(f"conversations {seed}")

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, vocabulary.size) for _ in range(count))

    system = tokens(rng.choice((BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE + 5)))
    turns: list[Turn] = []
    lengths: dict[str, int] = {}
    while len(turns) < _NUM_TURNS:
        left = [name for name, length in lengths.items() if length + _MAX_OUTPUTS + 2 < MAX_TOKENS]
        after = rng.choice(left) if left and rng.random() < 0.5 else None
        begun = () if after or rng.random() < 0.4 else system
        known = lengths[after] if after else len(begun)
        new = begun + tokens(rng.randint(1, min(_MAX_NEW, MAX_TOKENS - known - _MAX_OUTPUTS - 1)))
        copies = rng.choice((1, 1, 1, 2))  # n > 1
        for _ in range(copies):
            name = f"{seed}.{len(turns)}"
            sampling = _sampling(rng, vocabulary, is_seeded=copies > 1 or rng.random() < 0.5)
            turns.append(Turn(name, after, new, sampling, 0.0))
            lengths[name] = known + len(new) - len(begun) + sampling.max_output_tokens
    return tuple(turns)


def _sampling(rng: random.Random, vocabulary: Vocabulary, *, is_seeded: bool) -> Sampling:
    grammar = rng.choice(vocabulary.grammars) if vocabulary.grammars and rng.random() < 0.15 else None
    return Sampling(
        max_output_tokens=rng.randint(1, _MAX_OUTPUTS),
        temperature=rng.choice((0.7, 1.0, 1.5)) if is_seeded else 0.0,
        seed=rng.randrange(1 << 30) if is_seeded else None,
        top_k=rng.choice((0, 0, 0, 7)),
        top_p=rng.choice((1.0, 1.0, 0.8)),
        min_p=rng.choice((0.0, 0.0, 0.02)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.0, 0.0, 1.5)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
        logit_bias=((rng.randrange(4, vocabulary.size), 3.0),) if rng.random() < 0.1 else (),
        stop_token_ids=(vocabulary.stop_token_id,) if grammar else (),
        grammar=grammar,
        num_logprobs=NUM_TOP,
        num_prompt_logprobs=NUM_TOP if rng.random() < 0.3 else None,
    )


def short_schedule(seed: int, layout: ParallelLayout, turns: tuple[Turn, ...]) -> RandomSchedule:
    """Of these requests, drawn for this layout: chunks, traffic, memory, aborts, and what may overtake."""
    rng = random.Random(f"schedule {seed} {layout}")
    followed = {turn.after for turn in turns}
    now_s, placed = 0.0, []
    for turn in turns:
        now_s += rng.choice((0.0, rng.expovariate(10.0)))
        # Nothing follows an aborted one: what it leaves is not the same everywhere.
        is_aborted = turn.request_id not in followed and rng.random() < 0.15
        placed.append(
            replace(
                turn, delay_s=rng.choice((0.0, 0.1)) if turn.after else now_s, is_cached=rng.random() < 0.9,
                session_id=rng.choice(("", "session")), abort_after=rng.randint(1, 12) if is_aborted else None,
            )
        )  # fmt: skip
    scheduler = SchedulerConfig(
        policy=rng.choice(("lars", *sorted(POLICIES))),
        chunking=rng.choice((Chunking.ADAPTIVE, Chunking.ADAPTIVE, Chunking.FIXED, Chunking.WHOLE)),
        step_budget_s=rng.choice((0.01, 0.03, 0.1)),
        tile_tokens=rng.choice((1, 8)),
        fixed_chunk_tokens=rng.choice((7, 24, 64)),
        max_batch_tokens=rng.choice((48, 400)),
        max_num_sequences=rng.choice((3, 16)),
        watermark=0.0,
        interruptible=rng.choice(("auto", "auto", False)),
    )
    kv = KVConfig(granule_tokens=BLOCK_SIZE, partition_tokens=BLOCK_SIZE, eviction=rng.choice(("value", "lru", "ttl")))
    # From hardly more than the longest request, where caches are evicted and decodes preempted, to plenty.
    num_blocks = shard_tokens(layout.kvp) // BLOCK_SIZE + rng.choice((1, 2, 6, 40))
    return RandomSchedule(
        tuple(placed), resolved(scheduler, can_hold=True), kv, num_blocks, shard_tokens(layout.kvp), MAX_TOKENS, seed
    )
