"""Puts a server under load and notes what every request saw: open loop by arrival times, closed loop by concurrency."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import aiohttp

from megatron_medha.bench.client import StreamResult, Target, TokenRange, completion_body, run_completion
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.stats.slo_targets import DeadlineMisses, Slo

# Building a prompt of a million ids and its JSON takes most of a second: it is done before the request is due.
_PREPARE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequest:
    """A request that has ended, with how late it was sent."""

    outcome: RequestStats
    send_lag_s: float                     # after its planned arrival
    token_times_s: tuple[float, ...]      # since the start of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadClient:
    """What requests are made with."""

    target: Target
    session: aiohttp.ClientSession
    model: str
    tokens: TokenRange
    slo: Slo
    seed: int
    isolated_s: Callable[[int], float]    # TTFT of a prompt of that length alone on the idle server

    def body(self, request: Request) -> bytes:
        """What is posted for the request: its token ids, drawn and encoded."""
        prompt = self.tokens.prompt(request.num_prompt_tokens, self.seed, request.request_id)
        return completion_body(self.target, self.model, prompt, request.max_output_tokens)

    async def send(self, request: Request, body: bytes, start_s: float) -> SentRequest:
        """One request, from its planned arrival (seconds after start_s) to its end."""
        streamed = await run_completion(self.target, self.session, body, request.max_output_tokens)
        return self.sent(request, streamed, start_s)

    def sent(self, request: Request, streamed: StreamResult, start_s: float) -> SentRequest:
        """What has become of a request with this answer."""
        times_s = tuple(at_s - start_s for at_s in streamed.token_times_s)
        gaps_s = [later - sooner for sooner, later in zip(times_s, times_s[1:], strict=False)]
        isolated_s = self.isolated_s(request.num_prompt_tokens)
        misses = None
        if self.slo.tbt_s is not None and times_s:
            misses = DeadlineMisses(self.slo.tbt_s)
            misses.first_token(times_s[0] - request.arrival_s, self.slo.deadline_s(isolated_s))
            for gap_s in gaps_s:
                misses.next_token(gap_s)
        outcome = RequestStats(
            request=request,
            ending=_ending(streamed),
            why=streamed.error,
            first_token_s=times_s[0] if times_s else None,
            last_token_s=times_s[-1] if times_s else None,
            num_tokens_out=streamed.num_tokens if times_s else 0,
            num_cached_tokens=streamed.num_cached_tokens,
            max_tbt_s=max(gaps_s, default=None),
            isolated_s=isolated_s,
            deadline_miss_rate=None if misses is None else misses.rate,
        )
        return SentRequest(
            outcome=outcome, send_lag_s=streamed.sent_s - start_s - request.arrival_s, token_times_s=times_s
        )

    def unfinished(self, request: Request) -> SentRequest:
        """A request that was given up when the run ended."""
        isolated_s = self.isolated_s(request.num_prompt_tokens)
        outcome = RequestStats(request=request, ending=Ending.UNFINISHED, why="the run ended", isolated_s=isolated_s)
        return SentRequest(outcome=outcome, send_lag_s=0.0, token_times_s=())


def _ending(streamed: StreamResult) -> Ending:
    if streamed.error is None:
        return Ending.FINISHED
    return Ending.REJECTED if streamed.status is not None and streamed.status != 200 else Ending.ABORTED


async def open_loop(
    client: LoadClient,
    requests: Iterable[Request],
    note: Callable[[SentRequest], None],
    max_drain_s: float | None = None,
) -> None:
    """Send each request at its arrival time, whatever has become of those before it.

    max_drain_s: seconds after the last arrival at which those under way are cancelled; None: all run to their end.
    """
    start_s = time.monotonic() + _PREPARE_S

    async def send_at(request: Request, body: bytes) -> None:
        await asyncio.sleep(start_s + request.arrival_s - time.monotonic())
        try:
            sent = await client.send(request, body, start_s)
        except asyncio.CancelledError:
            note(client.unfinished(request))
            raise
        note(sent)

    under_way: set[asyncio.Task[None]] = set()
    end_s = start_s
    async with asyncio.TaskGroup() as tasks:  # the first that raises, which is our own fault, ends all
        for request in requests:
            # Not all at once: prompts of an hour of long requests do not fit into memory.
            await asyncio.sleep(max(0.0, start_s + request.arrival_s - _PREPARE_S - time.monotonic()))
            task = tasks.create_task(send_at(request, client.body(request)))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            end_s = start_s + request.arrival_s
        if max_drain_s is not None:
            if under_way:
                await asyncio.wait(under_way, timeout=max(0.0, end_s + max_drain_s - time.monotonic()))
            for task in list(under_way):
                task.cancel()


async def closed_loop(
    client: LoadClient, requests: Iterable[Request], concurrency: int, note: Callable[[SentRequest], None]
) -> None:
    """Keep so many requests going: each that ends is followed by the next. Arrival is the moment of sending."""
    start_s = time.monotonic()
    waiting: Iterator[Request] = iter(requests)

    async def one_after_another() -> None:
        for request in waiting:
            body = client.body(request)
            arrived = replace(request, arrival_s=time.monotonic() - start_s)
            note(await client.send(arrived, body, start_s))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one_after_another())

