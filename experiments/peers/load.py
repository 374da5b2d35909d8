"""What a server is asked to do: lone prompts, decodes, and a mixed stream of short and long prompts."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

from tqdm import tqdm

from experiments.lib.http_stream import Streamed, complete
from experiments.peers.checkpoint import VOCAB_SIZE

FIRST_ID = 300  # past single bytes and special tokens
DECODE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the mixed stream."""

    at_s: float
    is_long: bool
    num_prompt_tokens: int
    num_output_tokens: int


def prompt(num_tokens: int, rng: random.Random) -> list[int]:
    """Random, so that no server finds it in a prefix cache."""
    return [rng.randrange(FIRST_ID, VOCAB_SIZE) for _ in range(num_tokens)]


async def solo(port: int, lengths: list[int], repeats: int, seed: int) -> dict[str, float]:
    """Prefill tokens/s by prompt length, from the median TTFT of lone prompts; decode tokens/s at batch 1 and 8."""
    rng = random.Random(seed)
    found: dict[str, float] = {}
    await _ask(port, prompt(64, rng), 8)  # whatever a server puts off until its first request
    for length in lengths:
        ttfts_s = [(await _ask(port, prompt(length, rng), 1)).ttft_s for _ in range(repeats)]
        found[f"prefill {length} tok/s"] = length / statistics.median(ttfts_s)
    for batch in (1, 8):
        rates = []
        for _ in range(repeats):
            streams = await asyncio.gather(*(_ask(port, prompt(32, rng), DECODE_TOKENS) for _ in range(batch)))
            first_s = max(stream.token_times_s[0] for stream in streams)
            # From when all of them decode: tokens may come joined, so they are counted by what was asked for.
            share = [sum(at_s > first_s for at_s in s.token_times_s) / len(s.token_times_s) for s in streams]
            end_s = max(stream.end_s for stream in streams)
            rates.append(DECODE_TOKENS * sum(share) / (end_s - first_s))
        found[f"decode batch {batch} tok/s"] = statistics.median(rates)
    return found


def mixed_stream(num_requests: int, rate: float, long_tokens: tuple[int, int], seed: int) -> list[Arrival]:
    """Poisson arrivals; every 20th prompt is long, at a drawn place, so that all seeds have the same mix."""
    rng = random.Random(seed)
    long_ones = set(rng.sample(range(num_requests), max(1, num_requests // 20)))
    arrivals, at_s = [], 0.0
    for index in range(num_requests):
        at_s += rng.expovariate(rate)
        is_long = index in long_ones
        num_prompt = rng.randint(*(long_tokens if is_long else (64, 256)))
        arrivals.append(Arrival(at_s, is_long, num_prompt, rng.randint(16, 32 if is_long else 64)))
    return arrivals


async def mixed(port: int, arrivals: list[Arrival], seed: int) -> dict[str, float]:
    """TTFT and time between tokens by class, and throughput, of one stream."""
    rng = random.Random(seed)
    prompts = [prompt(arrival.num_prompt_tokens, rng) for arrival in arrivals]
    started_s = time.monotonic()
    with tqdm(total=len(arrivals), desc="mixed", leave=False) as bar:

        async def one(arrival: Arrival, tokens: list[int]) -> Streamed:
            await asyncio.sleep(max(0.0, started_s + arrival.at_s - time.monotonic()))
            stream = await _ask(port, tokens, arrival.num_output_tokens)
            bar.update()
            return stream

        streams = await asyncio.gather(*(one(a, tokens) for a, tokens in zip(arrivals, prompts, strict=True)))
    took_s = max(stream.end_s for stream in streams) - started_s
    short = [stream for arrival, stream in zip(arrivals, streams, strict=True) if not arrival.is_long]
    long = [stream for arrival, stream in zip(arrivals, streams, strict=True) if arrival.is_long]
    gaps_s = [b - a for s in short for a, b in zip(s.token_times_s, s.token_times_s[1:], strict=False)]
    return {
        "short TTFT p50 s": quantile([s.ttft_s for s in short], 0.5),
        "short TTFT p99 s": quantile([s.ttft_s for s in short], 0.99),
        "long TTFT p50 s": quantile([s.ttft_s for s in long], 0.5),
        "long TTFT max s": max(s.ttft_s for s in long),
        "short TBT p99 ms": 1e3 * quantile(gaps_s, 0.99),
        "prompt tok/s": sum(arrival.num_prompt_tokens for arrival in arrivals) / took_s,
        "output tok/s": sum(arrival.num_output_tokens for arrival in arrivals) / took_s,
    }


def quantile(values: list[float], share: float) -> float:
    """The least value that so many are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _ask(port: int, tokens: list[int], num_outputs: int) -> Streamed:
    stream = await complete(port, tokens, num_outputs, may_join_tokens=True)
    if stream.error is not None:
        raise SystemExit(f"a request of {len(tokens)} tokens failed: {stream.error}")
    return stream
