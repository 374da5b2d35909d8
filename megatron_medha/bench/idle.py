"""TTFT of a prompt alone on the idle server, by its length: measured at a few lengths, straight lines between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from megatron_medha.bench.client import Target, TokenRange, completion_body, run_completion
from megatron_medha.core.errors import MedhaError

_REPEATS = 3           # of each length; the least counts, as something else may have run on the machine
_LONG_S = 5.0          # a length that takes longer than this is measured once: its noise is small beside it


class BenchError(MedhaError):
    """The run cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class IdleTimes:
    """Seconds at ascending lengths."""

    num_tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, num_tokens: int) -> float:
        """TTFT alone of a prompt of that length; below all lengths the first one's, above all in proportion."""
        index = bisect_left(self.num_tokens, num_tokens)
        if index == 0:
            return self.seconds[0]
        if index == len(self.num_tokens):
            return self.seconds[-1] * num_tokens / self.num_tokens[-1]
        x0, x1 = self.num_tokens[index - 1], self.num_tokens[index]
        y0, y1 = self.seconds[index - 1], self.seconds[index]
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)


def lengths_between(least: int, most: int) -> tuple[int, ...]:
    """`least`, its doublings, and `most`."""
    lengths = [least]
    while lengths[-1] * 2 < most:
        lengths.append(lengths[-1] * 2)
    return (*lengths, most) if most > least else (least,)


async def measure_idle(
    target: Target,
    session: aiohttp.ClientSession,
    model: str,
    tokens: TokenRange,
    lengths: Sequence[int],
    seed: int,
    note: Callable[[int, float], None],
) -> IdleTimes:
    """One prompt at a time, shortest first; `note` is called with every length. Raises BenchError if one fails."""
    seconds: list[float] = []
    for num_tokens in lengths:
        least_s = float("inf")
        for repeat in range(_REPEATS):
            prompt = tokens.prompt(num_tokens, seed, f"alone-{num_tokens}-{repeat}")
            streamed = await run_completion(target, session, completion_body(target, model, prompt, 1), 1)
            if streamed.error is not None:
                raise BenchError(f"a prompt of {num_tokens} tokens alone on the server failed: {streamed.error}")
            least_s = min(least_s, streamed.token_times_s[0] - streamed.sent_s)
            if least_s > _LONG_S:
                break
        # A longer prompt cannot be quicker; that it was is noise of the shorter one.
        seconds.append(max(least_s, seconds[-1]) if seconds else least_s)
        note(num_tokens, least_s)
    return IdleTimes(tuple(lengths), tuple(seconds))
