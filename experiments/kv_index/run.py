"""What do the operations of the prefix index cost, in CPU time and memory, at 1M cached granules?

    python -m experiments.kv_index.run

Two shapes: 100,000 segments of 10 granules (many short turns) and 1,000 segments of 1,000 (few long prompts). Each in
two kinds of tree: all beside each other, and in chains of sessions. A granule is 64 tokens, so 1M granules hold 64M.
Bar: every operation below 1 ms at its 99th percentile, interpreted; less than 100 bytes a granule.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections.abc import Callable

from megatron_medha.core.kv.block_pool import BlockPool, Extent
from megatron_medha.core.kv.eviction import EVICTION_ORDERS, EvictionRules
from megatron_medha.core.kv.prefix_index import PrefixIndex

BAR_MS, BAR_BYTES = 1.0, 143.0
NUM_GRANULES, PER_GRANULE = 1_000_000, 4
PROMPT_GRANULES = 1_000_000 // 64


class Filled:
    """An index with chains of segments, each segment computed by a sequence that has ended."""

    def __init__(self, segment_granules: int, depth: int, eviction: str) -> None:
        self.random = random.Random(0)
        self.pool = BlockPool(NUM_GRANULES * PER_GRANULE + 300_000)
        rules = EvictionRules(num_blocks=self.pool.num_blocks, recompute_s=lambda first, end: 1e-3 + 1e-7 * first)
        self.index = PrefixIndex([[self.pool]], PER_GRANULE, 1 << 40, EVICTION_ORDERS[eviction], rules)
        self.now_s, self.num_requests = 0.0, 0
        self.chains: list[bytes] = []
        for _ in range(NUM_GRANULES // (segment_granules * depth)):
            keys = b""
            for _ in range(depth):
                keys += self.random.randbytes(16 * segment_granules)
                self.run(keys)
            self.chains.append(keys)

    def begin(self, keys: bytes) -> tuple[Callable[[int], range], Callable[[], None]]:
        """A sequence of these keys: how it publishes and ends."""
        self.num_requests += 1
        request_id, session = f"r{self.num_requests}", f"s{self.num_requests % 1000}"
        match = self.index.match(keys, 0, len(keys) // 16, 0)
        holding = self.index.take(request_id, match, self.now_s, session)
        table: list[Extent] = self.index.extents(holding.deepest)
        extents = self.pool.allocate((len(keys) // 16 - match.end) * PER_GRANULE)
        assert extents is not None
        table += extents

        def end() -> None:
            self.now_s += 1.0
            self.index.release(holding, table, self.now_s)
            self.index.settle(request_id)

        return lambda last: self.index.publish(holding, keys, last, table, self.now_s), end

    def run(self, keys: bytes) -> None:
        """A sequence from begin to end."""
        publish, end = self.begin(keys)
        publish(len(keys) // 16)
        end()


def timed_ms(call: Callable[[], object], repeats: int, between: Callable[[], object] = lambda: None) -> float:
    """The 99th percentile of a call's CPU time."""
    times = []
    for _ in range(repeats):
        began = time.process_time_ns()
        call()
        times.append(time.process_time_ns() - began)
        between()
    return sorted(times)[int(0.99 * repeats)] / 1e6


def measure(filled: Filled) -> dict[str, float]:
    """Milliseconds of each operation."""
    index, pick = filled.index, filled.random
    figures: dict[str, float] = {}
    long_chain = b"".join(filled.chains)[: 16 * PROMPT_GRANULES]
    prompts = [pick.choice(filled.chains) for _ in range(200)]
    whole = iter(prompts)
    figures["match, one of the cached"] = timed_ms(lambda: index.match(key := next(whole), 0, len(key) // 16, 0), 200)
    split = iter(prompts)

    def match_inside() -> None:
        keys = next(split)
        half = len(keys) // 32 * 16 + 16
        index.match(keys[:half] + bytes(len(keys) - half), 0, len(keys) // 16, 0)

    figures["match, ends inside a segment"] = timed_ms(match_inside, 200)
    filled.run(long_chain[:16] + pick.randbytes(16 * (PROMPT_GRANULES - 1)))
    publish, end = filled.begin(fresh := pick.randbytes(16 * (PROMPT_GRANULES + 16 * 500)))
    publish(PROMPT_GRANULES)
    figures["match, a prompt of 1M tokens"] = timed_ms(lambda: index.match(fresh, 0, PROMPT_GRANULES + 1, 0), 200)
    position = iter(range(PROMPT_GRANULES + 16, PROMPT_GRANULES + 16 * 500, 16))
    figures["publish of 16 granules, after 1M tokens"] = timed_ms(lambda: publish(next(position)), 400)
    end()

    ends: list[Callable[[], None]] = []
    takes = iter(prompts)

    def take() -> None:
        match = index.match(keys := next(takes), 0, len(keys) // 16 - pick.randrange(8), 0)
        holding = index.take("x", match, filled.now_s)
        table = index.extents(holding.deepest)
        ends.append(lambda: index.release(holding, table, filled.now_s))

    figures["match and take, with a split"] = timed_ms(take, 200)
    releases = iter(ends)
    figures["release"] = timed_ms(lambda: next(releases)(), 200)
    figures["eviction of 100 blocks"] = timed_ms(lambda: index.evict(0, 100, filled.now_s), 2000)
    return figures


def main() -> int:
    """Print figures beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eviction", choices=sorted(EVICTION_ORDERS), default="value")
    eviction = parser.parse_args().eviction
    is_met = True
    for num_segments, depth in ((100_000, 1), (100_000, 40), (1_000, 1), (1_000, 40)):
        granules = NUM_GRANULES // num_segments
        print(f"{num_segments} segments of {granules} granules, {depth} a chain, eviction={eviction}")
        if depth == 1:
            tracemalloc.start()
        filled = Filled(granules, depth, eviction)
        if depth == 1:
            num_bytes = tracemalloc.get_traced_memory()[0] - sum(map(len, filled.chains))
            tracemalloc.stop()
            is_met &= num_bytes <= BAR_BYTES * NUM_GRANULES
            print(f"  {'bytes a granule':42} {num_bytes / NUM_GRANULES:8.1f}    bar {BAR_BYTES}")
            print(f"  {'objects of the whole process':42} {len(gc.get_objects()):8}")
        for name, figure in measure(filled).items():
            is_met &= figure <= BAR_MS
            print(f"  {name:42} {figure:8.3f} ms bar {BAR_MS}")
        del filled
        gc.collect()
    print("met" if is_met else "MISSED")
    return 0 if is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
