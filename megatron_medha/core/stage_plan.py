"""How the ranks of one kvp index pack a batch: their own chunks first, then each group that they share with others.

Every rank works through the same batches in the same order, and through each of them by its plan. A pipeline needs
nothing else to stream: the next chunk of a prompt may enter stage 0 while the last is in stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_medha.core.batch import Chunk


class SharedChunks(NamedTuple):
    """Chunks of one batch that the same kvp ranks attend to together."""

    kvp_ranks: tuple[int, ...]  # ascending
    indices: tuple[int, ...]    # of the chunks, among those given to `stage_plan`


class StagePlan(NamedTuple):
    """The rows of a packed batch. In every layer, those of shared chunks are exchanged between their kvp ranks."""

    num_tokens: int
    order: tuple[int, ...]  # of the chunks given, by index
    num_alone: int          # leading entries of `order` that no other kvp rank takes part in
    shared: tuple[SharedChunks, ...]


def stage_plan(chunks: Sequence[Chunk], kvp_rank: int) -> StagePlan:
    """The plan for the chunks that this kvp rank takes part in, given in the batch's order.

    Two ranks that share chunks see them in the same relative order, so both ends of every link agree.
    """
    alone: list[int] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    num_tokens = 0
    for index, chunk in enumerate(chunks):
        assert kvp_rank in chunk.kvp_ranks, f"{chunk.request_id}: kvp rank {kvp_rank} is not of {chunk.kvp_ranks}"
        num_tokens += chunk.num_tokens
        if len(chunk.kvp_ranks) == 1:
            alone.append(index)
        else:
            groups.setdefault(tuple(sorted(chunk.kvp_ranks)), []).append(index)
    order = (*alone, *(index for indices in groups.values() for index in indices))
    shared = tuple([SharedChunks(ranks, tuple(indices)) for ranks, indices in groups.items()])
    return StagePlan(num_tokens, order, len(alone), shared)
