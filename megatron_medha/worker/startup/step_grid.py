"""Measuring a fixed grid of steps on a loaded rank: chunks and decodes over contexts of many lengths, and mixtures."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_medha.cluster.messages import NewRequest, RankReady, RankStep
from megatron_medha.core.batch import Chunk
from megatron_medha.core.cost.fitted_cost import MeasuredStep
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.kv.block_pool import Extent, num_blocks_for
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.sampling import Sampling
from megatron_medha.worker.rank import Rank

_CHUNKS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048)
_DECODES = (1, 2, 4, 8, 16, 32)
_CONTEXT_SHARES = (0.0, 0.05, 0.25, 1.0)  # of the longest context measured
_MAX_CONTEXT = 131_072  # the law is linear in it from far below
_MIN_REPEATS, _MAX_REPEATS = 2, 20


@dataclass(frozen=True, slots=True)
class GridPoint:
    """A step to be measured: one chunk (none for 0 tokens) beside decodes, all over contexts of that many tokens."""

    chunk_tokens: int
    chunk_context: int
    num_decodes: int
    decode_context: int

    @property
    def num_kv_tokens(self) -> int:
        """About what its requests own."""
        return self.chunk_context + self.chunk_tokens + self.num_decodes * (self.decode_context + _MAX_REPEATS)

    @property
    def load(self) -> StepLoad:
        """As the cost model sees it."""
        load = StepLoad()
        if self.chunk_tokens > 1:
            load.add_chunk(self.chunk_context, self.chunk_tokens, 0.0)
        num_decodes = self.num_decodes + (self.chunk_tokens == 1)
        if num_decodes:
            context = self.num_decodes * (self.decode_context + 1)
            load.add_decodes(num_decodes, context + (self.chunk_context + 1) * (self.chunk_tokens == 1), 0.0)
        return load


def grid(num_kv_tokens: int, max_context_len: int) -> list[GridPoint]:
    """The points that fit into the rank's KV memory, in a fixed shuffled order: a drift must not look like a law."""
    longest = min(max_context_len - 1, _MAX_CONTEXT, num_kv_tokens // 2)
    contexts = sorted({int(share * longest) for share in _CONTEXT_SHARES})
    points = [GridPoint(chunk, context, 0, 0) for chunk in _CHUNKS for context in contexts]
    points += [GridPoint(0, 0, count, context) for count in _DECODES for context in contexts]
    points += [
        GridPoint(chunk, context, count, contexts[1])
        for chunk in (32, 128, 512)
        for context in contexts[:3]
        for count in (4, 16)
    ]
    fitting = [
        point
        for point in points
        if max(point.chunk_context + point.chunk_tokens, point.decode_context) + _MAX_REPEATS < max_context_len
        and point.num_kv_tokens < num_kv_tokens // 2
    ]
    random.Random(0).shuffle(fitting)
    return fitting


def measure(
    rank: Rank, ready: RankReady, points: Sequence[GridPoint], *, seconds: float, note: Callable[[int], None]
) -> list[MeasuredStep]:
    """The best time of each point that there was time for, each run at least twice; note(n) after n more points.

    The least of several, as what slows a step down from outside is no law of the machine.
    """
    rank.clear_kv()  # pages that were never written are all one page, which is read at the speed of a cache
    ends_s = time.monotonic() + seconds
    measured = []
    for index, point in enumerate(points):
        left_s = ends_s - time.monotonic()
        if left_s <= 0.0:
            break
        share_s = left_s / (len(points) - index)
        measured.append(MeasuredStep(ready.step_sizes.padded_load(point.load), _best_s(rank, ready, point, share_s)))
        note(1)
    return measured


def _best_s(rank: Rank, ready: RankReady, point: GridPoint, share_s: float) -> float:
    """Seconds of the step; its requests begin over KV that nobody has computed: zeros cost no other time."""
    started_s = time.monotonic()
    lengths = {f"decode-{i}": point.decode_context + 1 for i in range(point.num_decodes)}
    if point.chunk_tokens:
        lengths["chunk"] = point.chunk_context + point.chunk_tokens
    first_block, begin, new = 0, [], []
    sampling = Sampling(max_output_tokens=1, temperature=0.0)
    for request_id, length in lengths.items():
        count = num_blocks_for(length + _MAX_REPEATS, ready.block_size)
        begin.append(append_op(request_id, 0, (Extent(first_block, count),)))
        first_block += count
        new.append(NewRequest(request_id, array("i", [0] * length).tobytes(), length, sampling))
    first = tuple(Chunk(request_id, 0, 1, False) for request_id in lengths)
    rank.run(RankStep(1, first, tuple(new), kv_ops=tuple(begin)))
    durations: list[float] = []
    while len(durations) < _MIN_REPEATS or time.monotonic() - started_s < share_s and len(durations) < _MAX_REPEATS:
        # Single tokens sample as in serving, so their requests grow by one from run to run; chunks stay where they are.
        chunks = []
        for request_id, length in lengths.items():
            is_chunk = request_id == "chunk" and point.chunk_tokens > 1
            start = length - point.chunk_tokens if is_chunk else length - 1 + len(durations)
            count = point.chunk_tokens if is_chunk else 1
            chunks.append(Chunk(request_id, start, count, not is_chunk))
        begun_s = time.perf_counter()
        rank.run(RankStep(2, tuple(chunks)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - begun_s)
    rank.run(RankStep(3, (), (), tuple(lengths)))
    return min(durations)
