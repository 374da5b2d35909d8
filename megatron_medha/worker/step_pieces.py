"""A long step cut into pieces, which each layer computes one after the other: between two of them another step may run.

A piece's rows see those of earlier pieces in the KV that the layer has written. As no row's numbers depend on which
others are computed with it, cutting changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch

from megatron_medha.cluster.messages import RankStep
from megatron_medha.core.batch import Chunk
from megatron_medha.model.inference_context import BatchPiece, PackedBatch
from megatron_medha.worker.batch_tensors import StepTensors
from megatron_medha.worker.token_store import StoredRequest

_PIECE_S = 8e-3  # of one layer, as predicted; points are to be some 10 ms apart
# Of the longest chunk. Each piece reads all keys and values again. 28 M in bf16, two cores, tokens/s of lone prompts of
# 1K, 8K, 32K: 12,800, 7,900, 3,250 with 128 rows, 17,200, 9,500, 3,425 with 512 (steps of 50 ms: 15,200, 8,200, 3,070).
LEAST_ROWS = 512
_ALIGNMENT = 16  # rows, which matrix tiles take at once


def num_pieces_of(step: RankStep, num_layers: int) -> int:
    """The same on all ranks of the step. num_layers: of the whole model."""
    if not step.may_be_held:
        return 1
    return max(1, min(ceil(step.predicted_s / num_layers / _PIECE_S), step.longest_chunk // LEAST_ROWS))


def cut(
    chunks: Sequence[tuple[Chunk, StoredRequest]], num_pieces: int
) -> dict[int, Sequence[tuple[Chunk, StoredRequest]]]:
    """The chunks of each piece that has any, by its number, to be computed in this order; together the same tokens.

    Each chunk is cut by itself, so ranks that share one, and have others beside it, cut it alike.
    """
    pieces: list[list[tuple[Chunk, StoredRequest]]] = [[] for _ in range(num_pieces)]
    for chunk, request in chunks:
        ends = [ceil(chunk.num_tokens * i / num_pieces / _ALIGNMENT) * _ALIGNMENT for i in range(num_pieces)]
        for piece, first, end in zip(pieces, ends, [*ends[1:], chunk.num_tokens], strict=True):
            first, end = min(first, chunk.num_tokens), min(end, chunk.num_tokens)
            if first < end:
                samples = chunk.samples_token and end == chunk.num_tokens
                part = Chunk(chunk.request_id, chunk.start + first, end - first, samples, chunk.kvp_ranks)
                piece.append((part, request))
    return {number: piece for number, piece in enumerate(pieces) if piece}


def joined(pieces: Sequence[StepTensors]) -> StepTensors:
    """One step of all pieces' rows, in their order."""
    if len(pieces) == 1:
        return pieces[0]
    batches = [piece.batch for piece in pieces]
    sizes = [piece.token_ids_1T.shape[1] for piece in pieces]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    hidden_rows = [
        batch.hidden_rows + first for batch, first in zip(batches, firsts, strict=True) if batch.hidden_rows is not None
    ]
    positions = [batch.positions_T for batch in batches if batch.positions_T is not None]
    whole = PackedBatch(
        backend=batches[0].backend,
        plan=None,
        kv_layers=batches[0].kv_layers,
        rotation=batches[0].rotation,
        positions_T=torch.cat(positions) if positions else None,
        logit_rows=torch.cat([batch.logit_rows + first for batch, first in zip(batches, firsts, strict=True)]),
        hidden_rows=torch.cat(hidden_rows) if hidden_rows else None,
        pieces=tuple(
            BatchPiece(slice(first, first + size), batch)
            for first, size, batch in zip(firsts, sizes, batches, strict=True)
        ),
    )
    return StepTensors(
        torch.cat([piece.token_ids_1T for piece in pieces], dim=1),
        whole,
        tuple(request for piece in pieces for request in piece.sampling_requests),
        tuple(rows for piece in pieces for rows in piece.prompt_rows),
    )
