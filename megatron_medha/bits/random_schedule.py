"""Random conversations that share prefixes, and how they are scheduled."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

BLOCK_SIZE = 16  # below, a token's bits depend on where its blocks lie


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what comes before it, its own new tokens, and what becomes of it."""

    request_id: str
    after: str | None        # the request whose prompt and output its prompt begins with; None: of none
    new_tokens: tuple[int, ...]
    sampling: Sampling
    delay_s: float           # from the end of `after`, or from the beginning
    session_id: str = ""
    is_cached: bool = True
    abort_after: int | None = None  # batches since its arrival


@dataclass(frozen=True, slots=True)
class RandomSchedule:
    """Turns, and a configuration to play them under."""

    turns: tuple[Turn, ...]
    scheduler: SchedulerConfig
    kv: KVConfig
    num_blocks: int
    shard_tokens: int
    max_context_len: int
    seed: int


@dataclass
class _Writer:
    """Turns as they are drawn."""

    rng: random.Random
    vocab_size: int
    num_output_tokens: int  # at most
    share_of_prompts: float
    turns: list[Turn] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)  # prompt and output of a request

    def tokens(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(4, self.vocab_size) for _ in range(num_tokens))

    def add(self, after: str | None, tokens: tuple[int, ...], delay_s: float, session: str, is_seeded: bool) -> str:
        rng, name = self.rng, f"r{len(self.turns)}"
        num_outputs = rng.randint(1, self.num_output_tokens)
        sampling = Sampling(
            max_output_tokens=num_outputs,
            temperature=1.0 if is_seeded else 0.0,
            seed=rng.randrange(1 << 30) if is_seeded else None,
            num_logprobs=20,
            num_prompt_logprobs=0 if rng.random() < self.share_of_prompts else None,
            presence_penalty=rng.choice((0.0, 0.0, 0.0, 1.5)),
        )
        # What an aborted one leaves is random, so nothing follows it.
        abort_after = rng.randint(1, 20) if rng.random() < 0.1 else None
        self.turns.append(
            Turn(name, after, tokens, sampling, delay_s, session, rng.random() < 0.95, abort_after)
        )
        self.lengths[name] = (self.lengths[after] if after else 0) + len(tokens) + num_outputs
        return name


def random_case(
    seed: int, *, kvp: int = 1, vocab_size: int = 509, granule_tokens: int = 32, num_turns: int = 24,
    is_greedy: bool = False, num_output_tokens: int = 40, share_of_prompts: float = 0.05,
) -> RandomSchedule:  # fmt: skip
    """Sessions that continue, repeat and fork one another, over little memory: hits, evictions, preemptions, aborts.

    granule_tokens: what lengths are made of; granules are as long, or of one block, as they are by default.
    is_greedy: no seeded sampling. share_of_prompts: that ask for log-probabilities of the prompt.
    """
    rng = random.Random(f"exact hits {seed}")
    most_tokens = rng.choice((6, 10, 16)) * granule_tokens
    shard_tokens = most_tokens if kvp == 1 else rng.choice((2, 3, 5)) * granule_tokens
    most_tokens = min(most_tokens, kvp * shard_tokens)
    writer = _Writer(rng, vocab_size, min(num_output_tokens, most_tokens // 4), share_of_prompts)
    lengths = (granule_tokens - 1, granule_tokens, 2 * granule_tokens + 5)
    systems = [writer.tokens(rng.choice(lengths)) for _ in range(2)]
    ends: list[tuple[str, str]] = []  # requests that may be continued, with their sessions
    now_s = 0.0
    while len(writer.turns) < num_turns:
        now_s += rng.choice((0.0, rng.expovariate(2.0)))
        left = [end for end in ends if writer.lengths[end[0]] + writer.num_output_tokens + 2 < most_tokens]
        if left and rng.random() < 0.6:
            after, session = rng.choice(left)
            room = most_tokens - writer.lengths[after] - writer.num_output_tokens
            tokens = writer.tokens(rng.randint(1, min(room, 3 * granule_tokens)))
            first_s = rng.choice((0.0, 0.2))
        else:
            after, session, first_s = None, rng.choice(("", f"s{len(writer.turns)}")), now_s
            system = rng.choice((*systems, ()))[: most_tokens - writer.num_output_tokens - 1]
            room = most_tokens - writer.num_output_tokens - len(system)
            tokens = system + writer.tokens(rng.randint(1, min(room, 3 * granule_tokens)))
        copies = rng.choice((1, 1, 1, 3))  # n > 1, or the same prompt by several clients
        for _ in range(copies):
            name = writer.add(after, tokens, first_s, session, is_seeded=copies > 1 and not is_greedy)
            if writer.turns[-1].abort_after is None:
                ends.append((name, session))
    scheduler = SchedulerConfig(
        policy=rng.choice(sorted(POLICIES)),
        chunking=rng.choice((Chunking.ADAPTIVE, Chunking.FIXED, Chunking.WHOLE)),
        step_budget_s=rng.choice((2e-3, 0.01, 0.05)),
        tile_tokens=rng.choice((1, 8)),
        fixed_chunk_tokens=rng.choice((7, 24, 64)),
        max_batch_tokens=rng.choice((64, 400)),
        max_num_sequences=rng.choice((4, 16)),
        watermark=0.0,
    )
    # From hardly more than the longest request, where caches are evicted and decodes preempted, to plenty.
    num_blocks = shard_tokens // BLOCK_SIZE + rng.choice((2, 10, 60))
    eviction = rng.choice(("value", "lru", "ttl"))
    kv = KVConfig(
        granule_tokens=rng.choice((BLOCK_SIZE, BLOCK_SIZE, granule_tokens)), eviction=eviction,
        partition_tokens=rng.choice((BLOCK_SIZE, granule_tokens)),  # so that short prompts have several
    )  # fmt: skip
    return RandomSchedule(tuple(writer.turns), scheduler, kv, num_blocks, shard_tokens, 4096, seed)
