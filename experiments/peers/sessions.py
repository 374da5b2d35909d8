"""Sessions as agents have them: each turn's prompt is the last one, the server's own output and new tokens."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from tqdm import tqdm

from experiments.lib.random_llama import VOCAB_SIZE
from experiments.peers.load import FIRST_ID, SHORT_OUTPUTS, Endpoint, Mixed, Seen, Turn
from megatron_medha.bench.client import Target, TokenRange, find_model
from megatron_medha.bench.idle import BenchError
from megatron_medha.bench.load_generator import LoadClient
from megatron_medha.bench.session_loop import session_loop
from megatron_medha.bench.session_prompts import PromptForm, prompt_maker
from megatron_medha.bench.turn_table import SentTurn
from megatron_medha.stats.request_stats import Ending
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.workload.session_play import SessionPlay
from megatron_medha.workload.sessions import TurnRow, build_sessions

TOKENS = TokenRange(lowest=FIRST_ID, highest=VOCAB_SIZE - 1)
MOST_BESIDE = 400            # sessions beside a mixed stream: more than can end before it does
TURN_TOKENS = 1024           # of context, for each turn
FIRST_SHARE = 0.25           # of the context: the first prompt (instructions, tools, files)
NEW_SPREAD = 0.5             # new tokens of a turn are within so much of their mean
# Pauses between an agent's calls, as published by a router's users: 86.5% below 1 s, 95.1% below 10 s. They end at
# 600 s there and at 60 s here. Only the shape counts: it is scaled to the mean that is asked for.
_THINK_S = ((0.0, 0.1), (0.865, 1.0), (0.951, 10.0), (1.0, 60.0))


@dataclass(frozen=True, slots=True)
class Sessions:
    """So many sessions at a time, closed loop, each growing to the same context."""

    num_sessions: int
    context_len: int
    think_s: float               # mean pause between an output and the next prompt

    def rows(self, seed: int, index: int, name: str) -> list[TurnRow]:
        """One session. Sizes and pauses are drawn without replacement: all sessions have the same mix of them."""
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
        # Not in step: their starts are spread over one mean pause.
        start_s = index % self.num_sessions * self.think_s / self.num_sessions
        num_tokens, rows = 0, []
        for number, (think_s, num_new) in enumerate(zip([0.0, *thinks], [num_first, *new], strict=True)):
            num_tokens += num_new
            rows.append(TurnRow(name, num_tokens, outputs[number], start_s=start_s, think_s=scale * think_s))
            num_tokens += outputs[number]
        return rows

    async def run(self, endpoint: Endpoint, seed: int) -> Seen:
        """All sessions once, each with a text of its own."""
        seen, started_s = Seen(), time.monotonic()
        name = f"{self.num_sessions}-{self.context_len}"
        rows = [row for i in range(self.num_sessions) for row in self.rows(seed, i, f"{name}-{i}")]
        with tqdm(total=len(rows), desc="  turns", leave=False, dynamic_ncols=True) as bar:

            def note(turn: Turn) -> None:
                seen.add_turn(turn)
                bar.update()

            await play(endpoint, rows, seed, note)
        seen.took_s = time.monotonic() - started_s
        return seen


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
        rows = [row for i in range(MOST_BESIDE) for row in self.sessions.rows(seed, i, f"beside-{i}")]
        turns: list[Turn] = []
        background = asyncio.create_task(play(endpoint, rows, seed, turns.append, self.sessions.num_sessions))
        stream = asyncio.create_task(self.mixed.run(endpoint, seed))
        await asyncio.wait((background, stream), return_when=asyncio.FIRST_COMPLETED)
        if not stream.done():
            stream.cancel()
            await background   # its error, if it has one
            raise SystemExit(f"all {MOST_BESIDE} sessions ended before the stream did")
        background.cancel()
        await asyncio.wait((background,))
        seen = await stream
        seen.turns = turns
        return seen


async def play(
    endpoint: Endpoint, rows: Sequence[TurnRow], seed: int, note: Callable[[Turn], object], max_live: int | None = None
) -> None:
    """The sessions as `medha bench` plays them; note is called with every turn that has ended.

    Raises SystemExit for a turn that failed, and where output comes without its ids: figures would mean nothing.
    """
    target = Target(url=f"http://127.0.0.1:{endpoint.port}", request_timeout_s=1800.0)
    async with target.session() as session:
        model = (await find_model(target, session)).name
        try:
            maker = await prompt_maker(PromptForm.IDS, target, session, model, TOKENS, seed)
        except BenchError as error:
            raise SystemExit(str(error)) from None
        client = LoadClient(
            target=target, session=session, model=model, tokens=TOKENS, slo=Slo(), seed=seed,
            isolated_s=lambda num_tokens: 0.0,
        )  # fmt: skip
        sessions = build_sessions(rows, tokens_per_hash_id=TURN_TOKENS)

        def note_turn(turn: SentTurn) -> None:
            note(turn_of(turn))

        await session_loop(client, SessionPlay(sessions, max_live=max_live), maker, note_turn)


def turn_of(turn: SentTurn) -> Turn:
    """As it is kept and judged. Raises SystemExit for one that failed."""
    outcome = turn.sent.outcome
    request = outcome.request
    if outcome.ending is not Ending.FINISHED or outcome.ttft_s is None:
        raise SystemExit(f"a turn of {request.num_prompt_tokens} tokens failed: {outcome.why}")
    num_before = request.num_prompt_tokens - turn.num_new_tokens
    # The last output token has not been through the model.
    num_reusable = max(0, num_before - 1)
    ttft_s = outcome.ttft_s - turn.sent.send_lag_s
    return Turn(
        turn.session, turn.number - 1, num_reusable, request.num_prompt_tokens, outcome.num_cached_tokens,
        request.max_output_tokens, ttft_s,
    )  # fmt: skip


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
    turns = Sessions(num_sessions, context_len, 1.0).rows(0, 0, "")
    work_s = lone.seconds(0, context_len) + (len(turns) - 1) * lone.constant_s
    work_s += sum(turn.output_tokens for turn in turns) * output_token_s
    return work_s / len(turns) * max(0.0, num_sessions / utilisation - 1)


def _strata(count: int) -> list[float]:
    """The middles of so many equal parts of 0 to 1."""
    return [(index + 0.5) / count for index in range(count)]


def _think_s(share: float) -> float:
    """The quantile of the pauses, in the logarithm straight between the published ones."""
    for (x0, y0), (x1, y1) in zip(_THINK_S, _THINK_S[1:], strict=False):
        if share <= x1:
            return y0 * math.exp(math.log(y1 / y0) * (share - x0) / (x1 - x0))
    raise AssertionError(share)
