"""Turns the chunks of one step into what the model takes: token ids, positions, slots and rows of interest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_medha.core.batch import Chunk
from megatron_medha.kernels.backends import AttentionBackend, LayerKV, QueryRange
from megatron_medha.kernels.slot_table import SlotTable
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.rotary import Rotary
from megatron_medha.worker.token_store import StoredRequest


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows whose logits predict prompt tokens that were asked for with their log-probabilities."""

    request: StoredRequest
    first_position: int  # of the predicted tokens
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step, ready for the model."""

    token_ids_1T: Tensor  # int64
    batch: PackedBatch
    sampling_requests: tuple[StoredRequest, ...]  # in the order of the logit rows
    prompt_rows: tuple[PromptRows, ...]           # in the order of the kept hidden rows


def append_extents(
    chunks: Sequence[tuple[Chunk, StoredRequest]], *, block_size: int, backend: AttentionBackend
) -> None:
    """Note the blocks each chunk brings; one that starts at 0 begins a new table."""
    for chunk, request in chunks:
        if chunk.start == 0:
            request.slot_table = SlotTable(block_size, backend.min_run_tokens)
        if chunk.new_extents:
            assert request.slot_table is not None, f"{chunk.request_id}: first chunk starts at {chunk.start}"
            request.slot_table.append(chunk.new_extents)


def step_tensors(
    chunks: Sequence[tuple[Chunk, StoredRequest]],
    *,
    backend: AttentionBackend,
    kv_layers: Sequence[LayerKV],
    rotary: Rotary,
) -> StepTensors:
    """Pack chunks, in their order, along one token axis. Their blocks must have been noted before."""
    num_tokens = sum(chunk.num_tokens for chunk, _ in chunks)
    token_ids = np.empty(num_tokens, dtype=np.int64)
    positions = np.empty(num_tokens, dtype=np.int64)
    lengths = np.empty(num_tokens, dtype=np.int64)
    ranges: list[QueryRange] = []
    logit_rows: list[int] = []
    hidden_rows: list[np.ndarray] = []
    sampling_requests: list[StoredRequest] = []
    prompt_rows: list[PromptRows] = []
    row = 0
    for chunk, request in chunks:
        start, count = chunk.start, chunk.num_tokens
        end_row = row + count
        token_ids[row:end_row] = request.tokens(start, count)
        positions[row:end_row] = start if count == 1 else np.arange(start, start + count)
        np.maximum(positions[row:end_row] + 1, request.num_prompt_tokens, out=lengths[row:end_row])
        assert request.slot_table is not None, f"{chunk.request_id}: a chunk at {start} without blocks"
        ranges.append(QueryRange(row, count, start, request.slot_table))
        if chunk.samples_token:
            assert start + count == request.num_tokens, (
                f"{chunk.request_id}: samples after token {start + count} of {request.num_tokens}"
            )
            logit_rows.append(end_row - 1)
            sampling_requests.append(request)
        if request.sampling.num_prompt_logprobs is not None:
            num_predicted = min(start + count, request.num_prompt_tokens - 1) - start
            if num_predicted > 0:
                hidden_rows.append(np.arange(row, row + num_predicted))
                prompt_rows.append(PromptRows(request, start + 1, num_predicted))
        row = end_row
    positions_T = torch.from_numpy(positions)
    batch = PackedBatch(
        backend=backend,
        plan=backend.plan(ranges),
        kv_layers=kv_layers,
        rotation=rotary.at(positions_T, torch.from_numpy(lengths)),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        hidden_rows=torch.from_numpy(np.concatenate(hidden_rows)) if hidden_rows else None,
    )
    return StepTensors(torch.from_numpy(token_ids).unsqueeze(0), batch, tuple(sampling_requests), tuple(prompt_rows))
