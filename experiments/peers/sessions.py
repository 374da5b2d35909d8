"""Sessions as agents have them: each turn's prompt is the last one, the server's own output and new tokens."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from experiments.peers.load import SHORT_OUTPUTS, Endpoint, Mixed, Seen, Turn, prompt

if TYPE_CHECKING:
    from experiments.lib.http_stream import Streamed

TURN_TOKENS = 1024           # of context, for each turn
FIRST_SHARE = 0.25           # of the context: the first prompt (instructions, tools, files)
NEW_SPREAD = 0.5             # new tokens of a turn are within so much of their mean
# Pauses between an agent's calls, as published by a router's users: 86.5% below 1 s, 95.1% below 10 s. They end at
# 600 s there and at 60 s here. Only the shape counts: it is scaled to the mean that is asked for.
_THINK_S = ((0.0, 0.1), (0.865, 1.0), (0.951, 10.0), (1.0, 60.0))


@dataclass(frozen=True, slots=True)
class PlannedTurn:
    """What a client does in a turn: it thinks, then asks."""

    think_s: float
    num_new_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Sessions:
    """So many sessions at a time, closed loop, each growing to the same context."""

    num_sessions: int
    context_len: int
    think_s: float               # mean

    def planned(self, seed: int, index: int) -> list[PlannedTurn]:
        """Of one session. Sizes and pauses are drawn without replacement: all sessions have the same mix of them."""
        rng = random.Random(f"{seed}/session/{index}")
        num_turns = max(2, self.context_len // TURN_TOKENS)
        num_first = int(FIRST_SHARE * self.context_len)
        num_later = num_turns - 1
        least, most = SHORT_OUTPUTS
        outputs = [int(least + share * (most - least)) for share in _strata(num_turns)]
        mean_new = (self.context_len - num_first - sum(outputs)) / num_later
        new = [int(mean_new * (1 + NEW_SPREAD * (2 * share - 1))) for share in _strata(num_later)]
        thinks = [_think_s(share) for share in _strata(num_later)]
        scale = self.think_s * num_later / sum(thinks)
        for values in (outputs, new, thinks):
            rng.shuffle(values)
        thinks, new = [0.0, *(scale * think for think in thinks)], [num_first, *new]
        return [PlannedTurn(*values) for values in zip(thinks, new, outputs, strict=True)]

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """All sessions once; their starts are spread over one mean pause, so that they are not in step."""
        seen, started_s = Seen(), time.monotonic()
        num_turns = len(self.planned(seed, 0))
        with tqdm(total=self.num_sessions * num_turns, desc="  turns", leave=False, dynamic_ncols=True) as bar:

            async def one(index: int) -> None:
                await asyncio.sleep(index * self.think_s / self.num_sessions)
                async for _ in self.turns(endpoint, seed, index, seen):
                    bar.update()

            await asyncio.gather(*(one(index) for index in range(self.num_sessions)))
        seen.took_s = time.monotonic() - started_s
        return seen

    async def turns(
        self, endpoint: Endpoint, seed: int, index: int, seen: Seen, is_over: asyncio.Event | None = None
    ) -> AsyncIterator[Streamed]:
        """One session, turn by turn; it ends early, between two turns, once is_over is set."""
        rng = random.Random(f"{seed}/tokens/{index}")
        tokens: list[int] = []
        num_reusable = 0
        for number, turn in enumerate(self.planned(seed, index)):
            await _pause(turn.think_s, is_over)
            if is_over is not None and is_over.is_set():
                return
            tokens += prompt(turn.num_new_tokens, rng)
            stream = await endpoint.ask_turn(tokens, turn.num_output_tokens)
            if len(stream.token_ids) != turn.num_output_tokens:
                raise SystemExit(f"{len(stream.token_ids)} ids of {turn.num_output_tokens} output tokens came")
            seen.turns.append(
                Turn(index, number, num_reusable, len(tokens), stream.num_cached_tokens, turn.num_output_tokens,
                     stream.ttft_s)
            )  # fmt: skip
            seen.num_prompt_tokens += len(tokens)
            seen.num_output_tokens += turn.num_output_tokens
            tokens += stream.token_ids
            num_reusable = len(tokens) - 1   # the last output token has not been through the model
            yield stream


@dataclass(frozen=True, slots=True)
class BesideSessions:
    """The mixed stream while sessions go on, a new one for each that ends."""

    mixed: Mixed
    sessions: Sessions

    @property
    def rate(self) -> float:
        """Of the mixed stream, requests/s."""
        return self.mixed.rate

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """Until the last request of the stream has ended; the sessions' turns are kept apart from its requests."""
        is_over, beside = asyncio.Event(), Seen()

        async def endless(first: int) -> None:
            await _pause(first * self.sessions.think_s / self.sessions.num_sessions, is_over)
            index = first
            while not is_over.is_set():
                async for _ in self.sessions.turns(endpoint, seed, index, beside, is_over):
                    pass
                index += self.sessions.num_sessions

        background = [asyncio.create_task(endless(index)) for index in range(self.sessions.num_sessions)]
        seen = await self.mixed.run(endpoint, seed)
        is_over.set()
        await asyncio.gather(*background)
        seen.turns = beside.turns
        return seen


@dataclass(frozen=True, slots=True)
class LonePrefill:
    """Seconds of an uncached prompt alone on its server: a constant, a part for each token, one for each pair."""

    constant_s: float
    token_s: float
    pair_s: float

    @classmethod
    def fitted(cls, seconds: Mapping[int, float]) -> LonePrefill:
        """To TTFT by length: least squares of relative errors, no coefficient negative.

        Raises ValueError without any length.
        """
        if not seconds:
            raise ValueError("no lone prefill was measured")
        lengths, times = np.array(list(seconds), float), np.array(list(seconds.values()))
        terms = np.stack([np.ones_like(lengths), lengths, lengths**2]) / times
        best, least = np.zeros(3), math.inf
        for count in range(1, min(3, len(seconds)) + 1):
            for chosen in combinations(range(3), count):
                found = np.zeros(3)
                found[list(chosen)] = np.linalg.lstsq(terms[list(chosen)].T, np.ones_like(times), rcond=None)[0]
                error = float(np.sum((found @ terms - 1) ** 2))
                if (found >= 0).all() and error < least:
                    best, least = found, error
        return cls(*map(float, best))

    def seconds(self, start: int, end: int) -> float:
        """A request for the tokens from start to end alone, whose tokens before start are computed already."""
        return self.constant_s + self.token_s * (end - start) + self.pair_s * (end**2 - start**2)


def mean_think_s(
    lone: LonePrefill, output_token_s: float, num_sessions: int, context_len: int, utilisation: float
) -> float:
    """The pause with which so many sessions keep a server so busy that computes new tokens only."""
    turns = Sessions(num_sessions, context_len, 1.0).planned(0, 0)
    work_s = lone.seconds(0, context_len) + (len(turns) - 1) * lone.constant_s
    work_s += sum(turn.num_output_tokens for turn in turns) * output_token_s
    return work_s / len(turns) * max(0.0, num_sessions / utilisation - 1)


async def _pause(seconds: float, is_over: asyncio.Event | None) -> None:
    if is_over is None:
        await asyncio.sleep(seconds)
        return
    try:
        await asyncio.wait_for(is_over.wait(), seconds)
    except TimeoutError:
        return


def _strata(count: int) -> list[float]:
    """The middles of so many equal parts of 0 to 1."""
    return [(index + 0.5) / count for index in range(count)]


def _think_s(share: float) -> float:
    """The quantile of the pauses, in the logarithm straight between the published ones."""
    for (x0, y0), (x1, y1) in zip(_THINK_S, _THINK_S[1:], strict=False):
        if share <= x1:
            return y0 * math.exp(math.log(y1 / y0) * (share - x0) / (x1 - x0))
    raise AssertionError(share)
