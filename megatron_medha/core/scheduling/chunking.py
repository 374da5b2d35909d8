"""How much of a prompt goes into the next step, and how long a whole prompt will take in such steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_medha.core.cost.step_cost import CostModel, StepLoad
from megatron_medha.core.cost.step_sizes import NO_STEP_SIZES, StepSizes

_MAX_LINEAR_PROBES = 4
_MAX_SLOWDOWN = 0.01  # of a prompt alone, by chunks that are smaller than the best
_MAX_KNOWN = 1 << 16   # lengths of prompts, and where they stand, of which the time is kept
_MAX_HALVINGS = 6     # of the largest, until chunks are too small


class Chunking(Enum):
    """Ways to size a chunk. A new one is a member here and an entry in STRATEGIES."""

    ADAPTIVE = "adaptive"  # the most that keeps the whole step within its time budget
    FIXED = "fixed"        # a token budget per step, decodes included (Sarathi-Serve, vLLM)
    WHOLE = "whole"        # the rest of the prompt at once

    # There is one object of each. Enum's own is a call into Python, at every look into STRATEGIES.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRule:
    """Bounds every chunk obeys."""

    chunking: Chunking
    tile_tokens: int       # adaptive chunks are multiples of this, except a prompt's last and tiles that are cut
    max_tokens: int        # query tokens in one step
    fixed_tokens: int      # the token budget of FIXED
    max_chunk_tokens: int = 1 << 60  # of one sequence in one step
    step_sizes: StepSizes = NO_STEP_SIZES


def largest_chunk(
    rule: ChunkRule,
    cost: CostModel,
    load: StepLoad,
    start: int,
    num_tokens: int,
    budget_s: float,
    guess_tokens: int = 0,
) -> int:
    """The most of `num_tokens`, after `start` tokens of context, that fits into a step which already has `load`.

    guess_tokens: of an adaptive chunk, what is looked at first; it changes no result.
    """
    return STRATEGIES[rule.chunking].largest(rule, cost, load, start, num_tokens, budget_s, guess_tokens)


def _limit(rule: ChunkRule, load: StepLoad, num_tokens: int) -> int:
    return max(0, min(min(num_tokens, rule.max_tokens - load.num_tokens), rule.max_chunk_tokens))


def _rest(
    rule: ChunkRule, cost: CostModel, load: StepLoad, start: int, num_tokens: int, budget_s: float, guess_tokens: int
) -> int:
    return _limit(rule, load, num_tokens)  # a prompt longer than one step's buffers still has to be cut


def _within_tokens(
    rule: ChunkRule, cost: CostModel, load: StepLoad, start: int, num_tokens: int, budget_s: float, guess_tokens: int
) -> int:
    return max(min(_limit(rule, load, num_tokens), rule.fixed_tokens - load.num_tokens), 0)


def largest_in_time(
    rule: ChunkRule,
    cost: CostModel,
    load: StepLoad,
    start: int,
    num_tokens: int,
    budget_s: float,
    guess_tokens: int = 0,
) -> int:
    """The largest multiple of the tile (or all of num_tokens) whose step is predicted within budget_s.

    Where steps are filled up to sizes, tokens of this prompt go into what the multiple leaves of the size. Found by
    bracketing, since predictions never fall as chunks grow. 0 when not even one tile fits. guess_tokens is looked at
    first (a prompt's last chunk is seldom more than a tile off).
    """
    count = _largest_multiple(rule, cost, load, start, num_tokens, budget_s, guess_tokens)
    if count and rule.step_sizes:
        size = rule.step_sizes.padded(load.num_tokens + count, load.num_sequences + 1)
        filled = min(size - load.num_tokens, _limit(rule, load, num_tokens))
        if filled > count and _excess_s(cost, load, start, filled, budget_s) <= 0.0:
            return filled
    return count


def _largest_multiple(
    rule: ChunkRule,
    cost: CostModel,
    load: StepLoad,
    start: int,
    num_tokens: int,
    budget_s: float,
    guess_tokens: int = 0,
) -> int:
    """See largest_in_time; steps of any size."""
    limit = _limit(rule, load, num_tokens)
    if not limit:
        return 0
    tile_tokens = rule.tile_tokens
    if limit < num_tokens:
        limit -= limit % tile_tokens
    low, high = 0, -(-limit // tile_tokens)  # in tiles: low is known to fit (or is 0), high not to
    low_s = high_s = None
    guess = guess_tokens // tile_tokens
    if 0 < guess < high:
        seconds = _excess_s(cost, load, start, guess * tile_tokens, budget_s)
        if seconds <= 0.0:
            low, low_s = guess, seconds
            if guess + 1 < high:
                seconds = _excess_s(cost, load, start, (guess + 1) * tile_tokens, budget_s)
                if seconds > 0.0:
                    return guess * tile_tokens
                low, low_s = guess + 1, seconds
        else:
            high, high_s = guess, seconds
            if guess > 1:
                seconds = _excess_s(cost, load, start, (guess - 1) * tile_tokens, budget_s)
                if seconds <= 0.0:
                    return (guess - 1) * tile_tokens
                high, high_s = guess - 1, seconds
    if high_s is None:
        high_s = _excess_s(cost, load, start, limit, budget_s)
        if high_s <= 0.0:
            return limit
    if low_s is None:
        low_s = _excess_s(cost, load, start, 0, budget_s)
        if low_s > 0.0:
            return 0
    # Time is nearly linear in tokens, so the straight line between the two hits at once as a rule; where it does not,
    # halving ends the search.
    num_looks = 0
    while high - low > 1:
        middle = (low + high) // 2
        if num_looks < _MAX_LINEAR_PROBES:
            middle = min(max(low + int((high - low) * low_s / (low_s - high_s)), low + 1), high - 1)
        seconds = _excess_s(cost, load, start, middle * tile_tokens, budget_s)
        if seconds <= 0.0:
            low, low_s = middle, seconds
        else:
            high, high_s = middle, seconds
        num_looks += 1
    return low * tile_tokens


def _excess_s(cost: CostModel, load: StepLoad, start: int, num_tokens: int, budget_s: float) -> float:
    """By how much a chunk would break the budget of a step; at most 0 if it fits."""
    return (
        cost.linear_s(load.num_tokens + num_tokens, load.num_sequences + 1)
        + cost.attention_s(start, num_tokens)
        - (budget_s - load.attention_s)
    )


def _has_time(rule: ChunkRule, cost: CostModel, load: StepLoad, budget_s: float) -> bool:
    if load.num_tokens >= rule.max_tokens:
        return False
    return cost.linear_s(load.num_tokens + 1, load.num_sequences + 1) + load.attention_s <= budget_s


def _has_fixed_tokens(rule: ChunkRule, cost: CostModel, load: StepLoad, budget_s: float) -> bool:
    return load.num_tokens < min(rule.fixed_tokens, rule.max_tokens)


def _has_tokens(rule: ChunkRule, cost: CostModel, load: StepLoad, budget_s: float) -> bool:
    return load.num_tokens < rule.max_tokens


@dataclass(frozen=True, slots=True)
class ChunkStrategy:
    """What a way to size chunks consists of."""

    largest: Callable[[ChunkRule, CostModel, StepLoad, int, int, float, int], int]  # see largest_chunk
    has_room: Callable[[ChunkRule, CostModel, StepLoad, float], bool]  # for one more token, of a step with that load
    is_by_time: bool = False  # chunks obey a time budget: prefills may share it, and a tile that breaks it may be cut


STRATEGIES = {
    Chunking.ADAPTIVE: ChunkStrategy(largest_in_time, _has_time, is_by_time=True),
    Chunking.FIXED: ChunkStrategy(_within_tokens, _has_fixed_tokens),
    Chunking.WHOLE: ChunkStrategy(_rest, _has_tokens),
}


def num_step_tokens(rule: ChunkRule, cost: CostModel, budget_s: float) -> int:
    """Tokens of a prompt that fit into a step with nothing else."""
    return max(largest_chunk(rule, cost, StepLoad(), 0, rule.max_tokens, budget_s), rule.tile_tokens)


class PrefillTimes:
    """Predicted seconds of a lone prefill by its length, under the chunk rule and the step budget (Medha Alg. 3).

    Up to the first chunk's size a prompt is one step. From there on seconds per token, taken at a few dozen
    context lengths in geometric steps, are integrated; 1M tokens need no 30,000 chunk searches.
    """

    _GROWTH = 1.2

    def __init__(self, rule: ChunkRule, cost: CostModel, budget_s: float, max_tokens: int) -> None:
        self.revision = cost.revision
        empty = StepLoad()

        def chunk_at(start: int) -> int:
            return max(largest_chunk(rule, cost, empty, start, rule.max_tokens, budget_s), rule.tile_tokens)

        def rate_s(tokens: int) -> float:
            # Of the chunk in whose middle this token is; by its first token, large chunks would count too much.
            count = chunk_at(tokens)
            return (cost.linear_s(count, 1) + cost.attention_s(max(0, tokens - count // 2), count)) / count

        self.num_step_tokens = num_step_tokens(rule, cost, budget_s)
        first_chunk = min(self.num_step_tokens, max_tokens)
        self._tokens, self._seconds = [0], [0.0]
        self._known: dict[int, float] = {}  # what has been asked for: most lengths are, again and again
        tokens = 1
        while tokens < first_chunk:
            self._append(tokens, cost.linear_s(tokens, 1) + cost.attention_s(0, tokens))
            tokens *= 2
        self._append(first_chunk, cost.linear_s(first_chunk, 1) + cost.attention_s(0, first_chunk))
        rate = rate_s(first_chunk)
        while self._tokens[-1] < max_tokens:
            tokens = int(self._tokens[-1] * self._GROWTH) + rule.tile_tokens
            next_rate = rate_s(tokens)
            self._append(tokens, self._seconds[-1] + 0.5 * (rate + next_rate) * (tokens - self._tokens[-1]))
            rate = next_rate

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted seconds from nothing computed to `num_tokens` computed."""
        known = self._known.get(num_tokens)
        if known is not None:
            return known
        tokens, seconds = self._tokens, self._seconds
        index = bisect_right(tokens, num_tokens)
        if index == len(tokens):
            index -= 1
        x0, y0 = tokens[index - 1], seconds[index - 1]
        x1, y1 = tokens[index], seconds[index]
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[num_tokens] = found = y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)
        return found

    def _append(self, tokens: int, seconds: float) -> None:
        self._tokens.append(tokens)
        self._seconds.append(seconds)


def efficient_chunk_tokens(
    cost: CostModel, context: int, num_tokens: int, max_chunk_tokens: int, tile_tokens: int, spp: int
) -> int:
    """The smallest chunk with which `num_tokens` after `context` take at most 1% longer than with the best.

    The largest chunk is halved, and again. A smaller one is overtaken at less cost, and has fewer activations.
    """
    largest = min(num_tokens, max_chunk_tokens)
    seconds: dict[int, float] = {}
    for halvings in range(_MAX_HALVINGS + 1):
        tiles = -(-largest // (tile_tokens << halvings))
        count = min(tiles * tile_tokens, largest)
        seconds[count] = _prefill_s(cost, context, num_tokens, largest, count, spp)
        if count <= tile_tokens:
            break
    most_s = (1.0 + _MAX_SLOWDOWN) * min(seconds.values())
    return min([count for count, taken_s in seconds.items() if taken_s <= most_s])


def _prefill_s(cost: CostModel, context: int, num_tokens: int, largest: int, count: int, spp: int) -> float:
    """Predicted seconds of `num_tokens` in chunks of `count`: on one stage after another, the next chunk behind it.

    As the first `largest` of them, and the last chunk has the other stages to itself.
    """
    first_s = 0.0
    for start in range(0, largest, count):
        first_s += _chunk_s(cost, context + start, min(count, largest - start))
    last_s = _chunk_s(cost, context + num_tokens - count, count)
    return (first_s * num_tokens / largest + (spp - 1) * last_s) / spp


def _chunk_s(cost: CostModel, context: int, num_tokens: int) -> float:
    return cost.linear_s(num_tokens, 1) + cost.attention_s(context, num_tokens)
