"""Choosing next tokens from logits, and their log-probabilities. Stop handling and detokenising are elsewhere.

Tensor letters: R rows (one per request), D of these that draw, A that ask for log-probabilities, P that have penalties,
V vocabulary.

On a GPU nothing waits for the device before the tokens are asked for: what the host knows goes there in one pinned
copy, branches depend on that alone, and what it wants to know comes back in another. Hence no `torch.tensor` there (its
copy is waited for), no boolean index, no `bincount` and no accumulating `index_put_` (both look at their indices).

Order of one draw: what a grammar forbids, logit_bias, stop tokens masked while the output is shorter than
min_output_tokens, repetition, presence and frequency penalties, temperature, top_k, top_p, min_p, one inverse-CDF draw.
Log-probabilities describe the raw distribution of the model, before every step of that list
(vLLM calls this "raw_logprobs" and has it as its default too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_medha.core.sampling import Sampling, TokenLogprobs
from megatron_medha.kernels.staging import Staging
from megatron_medha.model.draw import Draws, SamplingRow, column, draw, draws_of, take_rows
from megatron_medha.model.logprobs import Logprobs, token_logprobs


class SampledRow(NamedTuple):
    """The chosen token and, when asked for, its log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None


class PendingSamples:
    """Tokens that the device has been asked to choose. Only `rows` waits for it."""

    def __init__(
        self, token_ids_R: Tensor, is_finite_R: Tensor, logprobs: Logprobs | None, nums_top: Mapping[int, int]
    ) -> None:
        """nums_top: by row, of those that asked for log-probabilities, in the order of `logprobs`."""
        self.token_ids_R = token_ids_R  # int64, on the device; within the vocabulary also where a row has no token
        self._nums_top = nums_top
        parts = [token_ids_R, is_finite_R]  # cat turns booleans into int64
        if logprobs is not None:
            parts += [part.double().view(torch.int64) if part.is_floating_point() else part for part in logprobs.flat]
        self._found = torch.cat(parts)
        self._is_ready: torch.cuda.Event | None = None
        if token_ids_R.device.type == "cuda":
            pinned = torch.empty(self._found.shape, dtype=torch.int64, pin_memory=True)
            self._found = pinned.copy_(self._found, non_blocking=True)
            self._is_ready = torch.cuda.Event()
            self._is_ready.record()

    def rows(self) -> list[SampledRow | None]:
        """The tokens; None where the logits hold NaN, +inf or nothing finite."""
        if self._is_ready is not None:
            self._is_ready.synchronize()
        num_rows, num_asking = len(self.token_ids_R), len(self._nums_top)
        if not num_asking:
            found = self._found.tolist()
            token_ids, is_finite = found[:num_rows], found[num_rows:]
            return [
                SampledRow(token_id, None) if sound else None
                for token_id, sound in zip(token_ids, is_finite, strict=True)
            ]
        token_ids, is_finite = self._found[: 2 * num_rows].view(2, num_rows).tolist()
        logprobs = Logprobs.of_flat(self._found[2 * num_rows :], num_asking)
        asked = dict(zip(self._nums_top, logprobs.listed(list(self._nums_top.values())), strict=True))
        return [
            SampledRow(token_id, asked.get(row)) if is_finite[row] else None for row, token_id in enumerate(token_ids)
        ]


class Sampler:
    """Chooses next tokens for rows of logits. Holds no state between calls."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        """Columns of the logits past vocab_size are padding and are never looked at."""
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._staging = Staging(self._device)

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], allowed: Mapping[int, Tensor] | None = None
    ) -> list[SampledRow | None]:
        """`choose`, waited for. A None row is its request's fault alone: the caller fails that and keeps the others."""
        return self.choose(logits_RV, rows, allowed).rows() if rows else []

    @torch.inference_mode()
    def choose(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], allowed: Mapping[int, Tensor] | None = None
    ) -> PendingSamples:
        """Have the device choose one token per row.

        logits_RV: any float dtype, at least vocab_size columns; left unchanged.
        allowed: (vocab_size,) bool by row, on the CPU: the only tokens that may be chosen there.
        """
        assert logits_RV.shape[0] == len(rows), f"{logits_RV.shape[0]} rows of logits for {len(rows)} requests"
        raw_RV = logits_RV[:, : self._vocab_size].float()
        allowed = allowed or {}
        nums_top = {
            r: row.sampling.num_logprobs for r, row in enumerate(rows) if row.sampling.num_logprobs is not None
        }
        drawn = [r for r, row in enumerate(rows) if not row.sampling.is_greedy]
        drawn_rows = [rows[r] for r in drawn]
        edits, draws, asking, masks = self._on_device(
            _edits_of(rows, self._vocab_size),
            draws_of(drawn, drawn_rows, self._vocab_size) if drawn else (),
            [np.array(list(nums_top), np.int64)] if nums_top else (),
            [mask_V.numpy() for mask_V in allowed.values()],
        )
        edited_RV = raw_RV.clone() if edits or masks else raw_RV
        for r, mask_V in zip(allowed, masks, strict=True):
            edited_RV[r].masked_fill_(~mask_V, -torch.inf)
        if edits:
            _edit(edited_RV, _Edits(*edits), rows)
        # max carries NaN and +inf along, so a look at every logit is saved.
        best_R, token_ids_R = edited_RV.max(dim=-1)
        if draws:
            on_device = Draws(*draws)
            drawn_D = draw(take_rows(edited_RV, on_device.rows_D), drawn_rows, on_device, self._allows_host_sync)
            is_all = len(drawn) == len(rows)
            token_ids_R = drawn_D if is_all else token_ids_R.index_copy(0, on_device.rows_D, drawn_D)
        logprobs = None
        if nums_top:
            asking_A = asking[0]
            raw_AV, ids_A = take_rows(raw_RV, asking_A), take_rows(token_ids_R, asking_A)
            logprobs = token_logprobs(raw_AV, ids_A, max(nums_top.values()), self._allows_host_sync)
        return PendingSamples(token_ids_R, torch.isfinite(best_R), logprobs, nums_top)

    @torch.inference_mode()
    def choose_greedy(self, logits_RV: Tensor) -> PendingSamples:
        """`choose` for rows whose sampling `is_plain_greedy`, without a look at each row's parameters."""
        best_R, greedy_R = logits_RV[:, : self._vocab_size].float().max(dim=-1)
        return PendingSamples(greedy_R, torch.isfinite(best_R), None, {})

    @property
    def _allows_host_sync(self) -> bool:
        """Whether the host may look at what the device has found and go on accordingly."""
        return self._device.type == "cpu"

    def _on_device(self, *groups: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """Groups of arrays, all in one copy."""
        arrays = [array for group in groups for array in group]
        tensors = iter(self._staging.upload(arrays) if arrays else ())
        return [[next(tensors) for _ in group] for group in groups]


def is_plain_greedy(sampling: Sampling) -> bool:
    """Whether the next token is always the one with the largest logit of the model, and nothing else is asked."""
    is_edited = sampling.logit_bias or sampling.min_output_tokens or has_penalty(sampling)
    is_free = sampling.grammar is None and sampling.num_logprobs is None
    return sampling.is_greedy and is_free and not is_edited


def has_penalty(sampling: Sampling) -> bool:
    """Whether the next token depends on which ones came before it."""
    has_output_penalty = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    return sampling.repetition_penalty != 1.0 or has_output_penalty


class _Edits(NamedTuple):
    """What changes logits before a token is chosen: arrays on the host, then tensors on the device."""

    bias_rows: Any        # int64
    bias_ids: Any         # int64
    biases: Any           # fp32
    masked_rows: Any      # int64
    masked_ids: Any       # int64
    penalised_P: Any      # int64
    output_places: Any    # int64, in a flattened [P, V]: one for each token of the outputs
    repetition_P1: Any    # fp32
    frequency_P1: Any     # fp32
    presence_P1: Any      # fp32


def _edits_of(rows: Sequence[SamplingRow], vocab_size: int) -> _Edits | tuple[()]:
    """Bias, stop masking and penalties; nothing when no row asks for any."""
    biases: dict[tuple[int, int], float] = {}
    for r, row in enumerate(rows):
        for token_id, bias in row.sampling.logit_bias:
            biases[r, token_id] = biases.get((r, token_id), 0.0) + bias
    masked = [
        (r, token_id)
        for r, row in enumerate(rows)
        if row.num_output_tokens < row.sampling.min_output_tokens
        for token_id in row.sampling.stop_token_ids
        if token_id < vocab_size
    ]
    penalised = [r for r, row in enumerate(rows) if has_penalty(row.sampling)]
    if not (biases or masked or penalised):
        return ()
    samplings = [rows[r].sampling for r in penalised]
    outputs = [np.array(rows[r].output_ids, np.int64) + p * vocab_size for p, r in enumerate(penalised)]
    return _Edits(
        bias_rows=np.array([r for r, _ in biases], np.int64),
        bias_ids=np.array([token_id for _, token_id in biases], np.int64),
        biases=np.array(list(biases.values()), np.float32),
        masked_rows=np.array([r for r, _ in masked], np.int64),
        masked_ids=np.array([token_id for _, token_id in masked], np.int64),
        penalised_P=np.array(penalised, np.int64),
        output_places=np.concatenate([np.empty(0, np.int64), *outputs]),
        repetition_P1=column([s.repetition_penalty for s in samplings], np.float32),
        frequency_P1=column([s.frequency_penalty for s in samplings], np.float32),
        presence_P1=column([s.presence_penalty for s in samplings], np.float32),
    )


def _edit(logits_RV: Tensor, edits: _Edits, rows: Sequence[SamplingRow]) -> None:
    """Bias, stop masking and penalties, in place."""
    if len(edits.biases):
        at = (edits.bias_rows, edits.bias_ids)
        logits_RV[at] = logits_RV[at] + edits.biases
    if len(edits.masked_ids):
        logits_RV[edits.masked_rows, edits.masked_ids] = -torch.inf
    if len(edits.penalised_P):
        penalised = [row for row in rows if has_penalty(row.sampling)]
        at_P = edits.penalised_P
        logits_RV[at_P] = _penalised(logits_RV[at_P], edits, penalised)


def _penalised(logits_PV: Tensor, edits: _Edits, rows: Sequence[SamplingRow]) -> Tensor:
    """Repetition over prompt and output, then frequency and presence over the output."""
    counts_PV = torch.zeros_like(logits_PV)
    # Small whole numbers: fp32 holds their sums exactly, whatever the order they are added in.
    counts_PV.view(-1).scatter_add_(0, edits.output_places, torch.ones_like(edits.output_places, dtype=torch.float32))
    is_seen_PV = torch.zeros_like(logits_PV, dtype=torch.bool)
    for p, row in enumerate(rows):
        if row.sampling.repetition_penalty != 1.0:
            assert row.prompt_ids is not None, "a repetition penalty without a prompt"
            is_seen_PV[p, row.prompt_ids.to(logits_PV.device, torch.int64)] = True
    is_output_PV = counts_PV > 0
    scale_PV = torch.where(logits_PV > 0, 1.0 / edits.repetition_P1, edits.repetition_P1)
    logits_PV = torch.where(is_seen_PV | is_output_PV, logits_PV * scale_PV, logits_PV)
    return logits_PV - edits.frequency_P1 * counts_PV - edits.presence_P1 * is_output_PV
