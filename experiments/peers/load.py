"""What a server is asked to do: lone prompts, decodes, a mixed stream, long prompts at once. Sessions: sessions.py."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from experiments.lib.http_stream import Streamed, answered
from experiments.lib.random_llama import VOCAB_SIZE

FIRST_ID = 300  # past single bytes and special tokens
DECODE_TOKENS = 128
SHORT_TOKENS = (64, 256)
SHORT_OUTPUTS, LONG_OUTPUTS = (16, 64), (16, 32)
LONGS_AT_ONCE_IN_ALL = 8
# Of the waves' short prompts: what a chat-like background brings, some 10% of two cores' time.
WAVE_SHORTS_PER_S = 2.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server as a load sees it."""

    port: int
    knows_priority: bool

    async def ask(self, tokens: list[int], num_outputs: int, *, is_long: bool = False) -> Streamed:
        """One request to its end."""
        fields = {"priority": int(is_long)} if self.knows_priority else None
        return await answered(self.port, tokens, num_outputs, timeout_s=1800.0, may_join_tokens=True, fields=fields)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a session as its client saw it."""

    session: str
    number: int                     # 0: the first, which nothing is cached of
    num_reusable_tokens: int        # of its prompt: computed by the turns before it
    num_prompt_tokens: int
    num_cached_tokens: int | None   # as the server reports; None: it did not
    num_output_tokens: int
    ttft_s: float


@dataclass(slots=True)
class Seen:
    """Of the requests of a load: raw figures, in seconds, so that any quantile can be made of them later."""

    took_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    short_ttft_s: list[float] = field(default_factory=list)
    long_ttft_s: list[float] = field(default_factory=list)
    short_gaps_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)   # tokens/s, of lone prompts and decodes
    turns: list[Turn] = field(default_factory=list)    # of sessions

    def add(self, stream: Streamed, num_outputs: int, *, is_long: bool) -> None:
        """A request that ended."""
        self.num_prompt_tokens += stream.num_prompt_tokens
        self.num_output_tokens += num_outputs
        if is_long:
            self.long_ttft_s.append(stream.ttft_s)
            return
        self.short_ttft_s.append(stream.ttft_s)
        times_s = stream.token_times_s
        self.short_gaps_s += [later - sooner for sooner, later in zip(times_s, times_s[1:], strict=False)]

    def add_turn(self, turn: Turn) -> None:
        """A turn that ended."""
        self.turns.append(turn)
        self.num_prompt_tokens += turn.num_prompt_tokens
        self.num_output_tokens += turn.num_output_tokens


def prompt(num_tokens: int, rng: random.Random) -> list[int]:
    """Random, so that no server finds it in a prefix cache."""
    return rng.choices(range(FIRST_ID, VOCAB_SIZE), k=num_tokens)


async def warm_up(endpoint: Endpoint, most_tokens: int) -> None:
    """Whatever a server puts off until its first requests, or learns from them; the same for all that can take it."""
    rng = random.Random("warm")
    for num_tokens in (64, 256, 1024, 4096):
        if num_tokens <= most_tokens:
            await endpoint.ask(prompt(num_tokens, rng), 16)
    await asyncio.gather(*(endpoint.ask(prompt(128, rng), 32) for _ in range(8)))


@dataclass(frozen=True, slots=True)
class Prefill:
    """Lone prompts of one length."""

    num_tokens: int
    repeats: int

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """Tokens/s up to the first token, of each."""
        rng, seen = random.Random(f"{seed}/prefill/{self.num_tokens}"), Seen()
        for _ in range(self.repeats):
            stream = await endpoint.ask(prompt(self.num_tokens, rng), 1)
            seen.rates.append(self.num_tokens / stream.ttft_s)
            seen.num_prompt_tokens += self.num_tokens
        return seen


@dataclass(frozen=True, slots=True)
class Decode:
    """So many answers at a time, while nothing prefills."""

    batch: int
    repeats: int

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """Tokens/s of all together, from when the last of them has its first token, of each repeat."""
        rng, seen = random.Random(f"{seed}/decode/{self.batch}"), Seen()
        for _ in range(self.repeats):
            prompts = [prompt(32, rng) for _ in range(self.batch)]
            streams = await asyncio.gather(*(endpoint.ask(tokens, DECODE_TOKENS) for tokens in prompts))
            first_s = max(stream.token_times_s[0] for stream in streams)
            # Tokens may come joined, so they are counted by what was asked for.
            shares = [sum(at_s > first_s for at_s in s.token_times_s) / len(s.token_times_s) for s in streams]
            end_s = max(stream.end_s for stream in streams)
            seen.rates.append(DECODE_TOKENS * sum(shares) / (end_s - first_s))
            seen.num_output_tokens += DECODE_TOKENS * self.batch
        return seen


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the mixed stream."""

    at_s: float
    is_long: bool
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Mixed:
    """An open stream: 19 of 20 prompts short, one long; Poisson arrivals whatever the server does."""

    num_requests: int
    rate: float                    # requests a second
    long_tokens: tuple[int, int]
    text: str = "mixed"            # of the same name: the same prompts, which a prefix cache finds

    def arrivals(self, seed: int) -> list[Arrival]:
        """Every 20th is long, at a drawn place, so that all seeds have the same mix."""
        rng = random.Random(seed)
        long_ones = set(rng.sample(range(self.num_requests), max(1, self.num_requests // 20)))
        arrivals, at_s = [], 0.0
        for index in range(self.num_requests):
            at_s += rng.expovariate(self.rate)
            is_long = index in long_ones
            num_prompt = rng.randint(*(self.long_tokens if is_long else SHORT_TOKENS))
            num_outputs = rng.randint(*(LONG_OUTPUTS if is_long else SHORT_OUTPUTS))
            arrivals.append(Arrival(at_s, is_long, num_prompt, num_outputs))
        return arrivals

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """TTFT from the moment of sending, which is that of the arrival to within a millisecond."""
        rng, seen = random.Random(f"{seed}/{self.text}"), Seen()
        arrivals = self.arrivals(seed)
        prompts = [prompt(arrival.num_prompt_tokens, rng) for arrival in arrivals]
        started_s = time.monotonic()
        with tqdm(total=len(arrivals), desc="  requests answered", leave=False, dynamic_ncols=True) as bar:

            async def one(arrival: Arrival, tokens: list[int]) -> None:
                await asyncio.sleep(max(0.0, started_s + arrival.at_s - time.monotonic()))
                stream = await endpoint.ask(tokens, arrival.num_output_tokens, is_long=arrival.is_long)
                seen.add(stream, arrival.num_output_tokens, is_long=arrival.is_long)
                seen.took_s = max(seen.took_s, stream.end_s - started_s)
                bar.update()

            await asyncio.gather(*(one(a, tokens) for a, tokens in zip(arrivals, prompts, strict=True)))
        return seen


@dataclass(frozen=True, slots=True)
class LongsAtOnce:
    """Eight long prompts in waves of so many at once, beside a steady stream of short ones."""

    at_once: int
    num_tokens: int  # of each long prompt

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """The next wave comes when all of this one have their first token: the same work for every size of wave."""
        rng, seen = random.Random(f"{seed}/longs/{self.at_once}"), Seen()
        started_s = time.monotonic()
        is_over = asyncio.Event()

        async def long_one() -> None:
            stream = await endpoint.ask(prompt(self.num_tokens, rng), 1, is_long=True)
            seen.add(stream, 1, is_long=True)

        async def short_one() -> None:
            num_outputs = rng.randint(*SHORT_OUTPUTS)
            stream = await endpoint.ask(prompt(rng.randint(*SHORT_TOKENS), rng), num_outputs)
            seen.add(stream, num_outputs, is_long=False)

        async def short_ones() -> None:
            async with asyncio.TaskGroup() as tasks:
                while not is_over.is_set():
                    await asyncio.sleep(rng.expovariate(WAVE_SHORTS_PER_S))
                    tasks.create_task(short_one())

        background = asyncio.create_task(short_ones())
        with tqdm(total=LONGS_AT_ONCE_IN_ALL, desc="  long prompts", leave=False, dynamic_ncols=True) as bar:
            for _ in range(LONGS_AT_ONCE_IN_ALL // self.at_once):
                await asyncio.gather(*(long_one() for _ in range(self.at_once)))
                bar.update(self.at_once)
        is_over.set()
        await background
        seen.took_s = time.monotonic() - started_s
        return seen
