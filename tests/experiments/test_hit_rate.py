"""The clairvoyant eviction that ours is held against: as good as any, and never worse than one that knows less."""

from __future__ import annotations

from functools import cache
from math import inf
from random import Random

import pytest

from experiments.hit_rate.access_trace import Access, AccessKind, AccessTrace, TracedRequest
from experiments.hit_rate.clairvoyant import belady_hits, hit_rate, lru_hits
from megatron_medha.core.batch import Arrived, Batch, Chunk, Completed
from megatron_medha.core.request import Request
from megatron_medha.workload.key_chain import KeyChain, TextSpan

GRANULE = 4


def traced(name: str, spans: list[TextSpan], num_out: int = 1) -> TracedRequest:
    chain = KeyChain(GRANULE)
    chain.extend(spans)
    request = Request(
        request_id=name, num_prompt_tokens=chain.num_tokens, max_output_tokens=num_out, arrival_s=0.0,
        prefix_keys=chain.keys,
    )  # fmt: skip
    return TracedRequest(request, bytearray(chain.keys))


def random_trace(draw: Random, num_requests: int, num_texts: int, most: int, at_once: int) -> AccessTrace:
    """Prompts that begin with a common granule and go on with one of several texts."""
    trace = AccessTrace()
    running: list[int] = []
    for index in range(num_requests):
        spans = [TextSpan("system", 0, GRANULE), TextSpan(f"t{draw.randrange(num_texts)}", 0, 1 + GRANULE * most)]
        spans[1] = spans[1]._replace(num_tokens=1 + GRANULE * draw.randint(1, most))
        trace.requests.append(traced(str(index), spans))
        trace.accesses.append(Access(AccessKind.BEGIN, index))
        running.append(index)
        while len(running) >= at_once or (running and draw.random() < 0.5):
            trace.accesses.append(Access(AccessKind.END, running.pop(draw.randrange(len(running)))))
    trace.accesses += [Access(AccessKind.END, index) for index in running]
    return trace


def best_hit_rate(trace: AccessTrace, capacity: int) -> float:
    """By trying every choice of leaves to evict."""
    prompts = [tuple(one.granules(GRANULE)) for one in trace.requests]
    parents = {granule: prompt[place - 1] for prompt in prompts for place, granule in enumerate(prompt) if place}

    @cache
    def best(place: int, present: frozenset[bytes], running: frozenset[int]) -> int:
        if place == len(trace.accesses):
            return 0
        kind, index = trace.accesses[place]
        num_hits = 0
        if kind is AccessKind.BEGIN:
            prompt = prompts[index]
            num_hits = next((i for i, granule in enumerate(prompt) if granule not in present), len(prompt))
            present, running = present | set(prompt), running | {index}
        else:
            running = running - {index}
        return num_hits + max(best(place + 1, left, running) for left in shrunk(present, running))

    @cache
    def shrunk(present: frozenset[bytes], running: frozenset[int]) -> frozenset[frozenset[bytes]]:
        pinned = {granule for index in running for granule in prompts[index]}
        leaves = present - {parents[granule] for granule in present if granule in parents} - pinned
        if len(present) <= capacity or not leaves:
            return frozenset({present})
        return frozenset(left for leaf in leaves for left in shrunk(present - {leaf}, running))

    total = sum(one.request.num_prompt_tokens for one in trace.requests)
    return best(0, frozenset(), frozenset()) * GRANULE / total


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_of_what_to_evict_has_more_hits_than_the_clairvoyant_one(seed: int) -> None:
    draw = Random(seed)
    trace = random_trace(draw, 8, 3, 3, at_once=draw.randint(1, 2))
    capacity = draw.randint(2, 7)
    assert hit_rate(trace, belady_hits(trace, GRANULE, capacity)) == pytest.approx(best_hit_rate(trace, capacity))


@pytest.mark.parametrize("seed", range(30))
def test_who_knows_the_future_is_not_behind_lru_and_endless_memory_not_behind_either(seed: int) -> None:
    draw = Random(seed)
    trace = random_trace(draw, 60, 8, 6, at_once=3)
    capacity = draw.randint(10, 40)
    recency, clairvoyant, endless = (
        sum(hits(trace, GRANULE, size))
        for hits, size in ((lru_hits, capacity), (belady_hits, capacity), (lru_hits, inf))
    )
    assert 0 < recency <= clairvoyant <= endless
    assert belady_hits(trace, GRANULE, 1 << 20) == lru_hits(trace, GRANULE, inf)


def test_a_trace_has_what_began_what_was_filled_and_what_ended() -> None:
    prompt = traced("r", [TextSpan("p", 0, 9)], num_out=3)
    keys = bytes(prompt.keys)
    trace = AccessTrace()
    trace.handled(Arrived(prompt.request), (), 0.0)
    for number, (start, count) in enumerate([(4, 5), (9, 1), (10, 1)]):
        trace.scheduled(Batch(number, (Chunk("r", start, count, True),), (), 0.0, 1.0, 1.0), 0.0)
        filled = (("r", b"k" * 16),) if start == 10 else ()
        trace.handled(Completed(number, 1.0, filled_keys=filled), (), 1.0)
    assert trace.accesses == [Access(AccessKind.BEGIN, 0), Access(AccessKind.END, 0)]
    assert trace.requests[0].num_hit_tokens == 4 and hit_rate(trace, trace.hits) == pytest.approx(4 / 9)
    assert trace.requests[0].all_granules == [keys[:16], keys[16:], b"k" * 16]
