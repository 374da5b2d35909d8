"""Hits of the same requests in the same order under an eviction that knows the future, and under others.

Belady's rule over granules: what is needed again last goes first, of those the one that lies deepest. What needs a
granule needs all before it, so none is evicted before what follows it. Granules of running requests stay, as in a run.
A prompt is in memory from its beginning, the granules of its answer from its end; a run needs those earlier, so the
rule has a little more memory than the run had.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import inf

from experiments.hit_rate.access_trace import AccessKind, AccessTrace

Place = Callable[[int, int], float]  # granule, number of requests begun -> its value; the least is evicted first


def belady_hits(trace: AccessTrace, granule_tokens: int, capacity: float) -> list[int]:
    """Prompt tokens of each request that are hits; capacity: granules in memory, inf: all."""
    return _hits(trace, granule_tokens, capacity, _by_next_use)


def lru_hits(trace: AccessTrace, granule_tokens: int, capacity: float) -> list[int]:
    """The same with what was used first evicted first."""
    return _hits(trace, granule_tokens, capacity, lambda uses: lambda granule, num_begun: float(num_begun))


def hit_rate(trace: AccessTrace, hits: Sequence[int]) -> float:
    """Share of all prompt tokens."""
    return sum(hits) / trace.num_prompt_tokens


def _by_next_use(uses: Sequence[Sequence[int]]) -> Place:
    def value(granule: int, num_begun: int) -> float:
        place = bisect_right(uses[granule], num_begun - 1)
        return -float(uses[granule][place]) if place < len(uses[granule]) else -inf

    return value


def _hits(
    trace: AccessTrace, granule_tokens: int, capacity: float, rule: Callable[[Sequence[Sequence[int]]], Place]
) -> list[int]:
    numbers: dict[bytes, int] = {}
    depths: list[int] = []
    uses: list[list[int]] = []  # by granule: the requests whose prompts need it, ascending
    prompts: list[list[int]] = []
    wholes: list[list[int]] = []
    for index, traced in enumerate(trace.requests):
        whole = [numbers.setdefault(key, len(numbers)) for key in traced.all_granules]
        for depth, granule in enumerate(whole):
            if granule == len(uses):
                uses.append([])
                depths.append(depth)
        prompt = whole[: len(traced.granules(granule_tokens))]
        for granule in prompt:
            uses[granule].append(index)
        prompts.append(prompt)
        wholes.append(whole)
    value = rule(uses)
    memory = _Memory(len(uses), capacity, depths)
    found: list[int] = []
    for kind, index in trace.accesses:
        num_prompt_granules = len(trace.requests[index].request.prefix_keys) // 16
        in_prompt = wholes[index][:num_prompt_granules]
        if kind is AccessKind.BEGIN:
            found.append(granule_tokens * memory.num_present(prompts[index]))
            for granule in in_prompt:
                memory.pin(granule)
        else:
            for granule in wholes[index][num_prompt_granules:]:
                memory.pin(granule)
            for granule in wholes[index]:
                memory.unpin(granule, value(granule, len(found)))
        memory.shrink()
    return found


class _Memory:
    """Which granules are there. Evicts those of least value that nobody uses, the deepest first."""

    def __init__(self, num_granules: int, capacity: float, depths: Sequence[int]) -> None:
        self._capacity, self._depths = capacity, depths
        self._is_present = bytearray(num_granules)
        self._num_pins = [0] * num_granules
        self._value: list[float | None] = [None] * num_granules  # of those that can be evicted
        self._heap: list[tuple[float, int, int]] = []
        self._num_present = 0

    def num_present(self, granules: Sequence[int]) -> int:
        """Of a prompt, from its beginning to the first that is not there."""
        return next((place for place, granule in enumerate(granules) if not self._is_present[granule]), len(granules))

    def pin(self, granule: int) -> None:
        """It is used, and computed if it is not there."""
        self._num_pins[granule] += 1
        self._value[granule] = None
        if not self._is_present[granule]:
            self._is_present[granule] = 1
            self._num_present += 1

    def unpin(self, granule: int, value: float) -> None:
        """One use less."""
        self._num_pins[granule] -= 1
        if not self._num_pins[granule]:
            self._value[granule] = value
            heappush(self._heap, (value, -self._depths[granule], granule))

    def shrink(self) -> None:
        """Evict what is too much."""
        while self._num_present > self._capacity and self._heap:
            value, _, granule = heappop(self._heap)
            if self._value[granule] == value and self._is_present[granule]:
                self._value[granule] = None
                self._is_present[granule] = 0
                self._num_present -= 1
