"""The sizes that steps are filled up to: a step replayed as a CUDA graph costs what the graph's size costs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from megatron_medha.core.cost.step_cost import CostModel, StepLoad


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Tokens of the graphs of a rank, ascending. Steps that fit none run as they are."""

    decodes: tuple[int, ...] = ()  # for single tokens alone, one of each sequence
    chunks: tuple[int, ...] = ()   # for any step
    max_sequences: int = 0         # in one with a chunk

    def fitting(self, num_tokens: int, num_sequences: int) -> int | None:
        """Tokens of the smallest graph with room for the step; None: there is none, and it runs as it is."""
        sizes = [_at_least(self.chunks, num_tokens)] if num_sequences <= self.max_sequences else []
        if num_tokens <= num_sequences:
            sizes.append(_at_least(self.decodes, num_tokens))
        return min((size for size in sizes if size is not None), default=None)

    def padded(self, num_tokens: int, num_sequences: int) -> int:
        """Tokens that are computed for a step of so many. It never falls as a step's tokens grow."""
        return self.fitting(num_tokens, num_sequences) or num_tokens

    def padded_load(self, load: StepLoad) -> StepLoad:
        """The load as it is computed."""
        return replace(load, num_tokens=self.padded(load.num_tokens, load.num_sequences))

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


NO_STEP_SIZES = StepSizes()
# Powers of two waste at most half of a small step's rows, whose weights are read anyway. Above 512 tokens of an 8B
# model on an H100 a layer takes longer than its launches.
GRAPH_SIZES = StepSizes((1, 2, 4, 8, 16, 32, 64, 128, 256), tuple(range(64, 513, 64)), 256)


def _at_least(sizes: tuple[int, ...], count: int) -> int | None:
    index = bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else None


class PaddedCost:
    """A CostModel of steps that are filled up: it asks another one for the size that is computed.

    Attention is asked for as it is: what fills a step up attends to nothing.
    """

    def __init__(self, cost: CostModel, sizes: StepSizes) -> None:
        self._cost, self._sizes = cost, sizes
        self.attention_s, self.decode_attention_s = cost.attention_s, cost.decode_attention_s

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        return self._cost.linear_s(self._sizes.padded(num_tokens, num_sequences), num_sequences)

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """See CostModel."""
        self._cost.observe(self._sizes.padded_load(load), duration_s)

    @property
    def revision(self) -> int:
        """See CostModel."""
        return self._cost.revision
