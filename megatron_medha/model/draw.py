"""Drawing tokens from logits: temperature, top_k, top_p, min_p, one inverse-CDF draw. What edits logits is elsewhere.

Tensor letters: R or D rows (one per request that draws), F of these with a rank filter, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_medha.core.sampling import Sampling

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIN_TEMPERATURE = 1e-30
_MAX_TEMPERATURE = float(np.finfo(np.float32).max)
_BLOCK_SIZE = 256
_NUCLEUS_GUESS = 1024


def _mix_64(value: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit integers. Source: Steele et al., OOPSLA 2014."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def draw_uniform(seed: int, draw: int) -> float:
    """The uniform number in [0, 1) of a request's draw: a function of (seed, draw) alone.

    No generator has a state to lose, so a recomputed or retried request draws the same numbers
    in whatever batch, on whatever device.
    """
    start = _mix_64((seed + _GOLDEN_GAMMA) & _MASK_64)
    return (_mix_64((start + (draw + 1) * _GOLDEN_GAMMA) & _MASK_64) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing one request's next token depends on, besides its logits."""

    sampling: Sampling
    # (num_prompt_tokens,), any integer dtype, on the sampler's device; read by the repetition penalty alone
    prompt_ids: Tensor | None
    output_ids: Sequence[int]  # tokens emitted so far; read by the penalties
    seed: int
    num_output_tokens: int     # emitted so far, hence also the index of this draw


class Draws(NamedTuple):
    """What drawing depends on: arrays on the host, then tensors on the device."""

    rows_D: Any           # int64
    temperatures_D1: Any  # fp32
    uniforms_D1: Any      # fp64
    min_ps_D1: Any        # fp32
    filtered_F: Any       # int64, among the rows that draw
    num_candidates_F1: Any    # int64
    has_top_k_F1: Any     # bool
    top_ps_F1: Any        # fp64


def take_rows(values: Tensor, indices: Tensor) -> Tensor:
    """Those rows; no copy when it is all of them."""
    return values if len(indices) == len(values) else values.index_select(0, indices)


def column(values: Sequence[float], dtype: type) -> np.ndarray:
    """A number per row."""
    return np.array(values, dtype).reshape(-1, 1)


def draws_of(indices: Sequence[int], rows: Sequence[SamplingRow], vocab_size: int) -> Draws:
    """indices: of these rows in the batch."""
    filtered = [d for d, row in enumerate(rows) if _has_rank_filter(row.sampling, vocab_size)]
    samplings = [rows[d].sampling for d in filtered]
    return Draws(
        rows_D=np.array(indices, np.int64),
        # Below the floor every temperature gives the greedy token, but fp32 would make it 0 and 0 / 0 is NaN.
        # Above the largest fp32 all are as good as infinite, but -inf / inf, of a token that is masked out, is NaN.
        temperatures_D1=column(
            [min(max(row.sampling.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE) for row in rows], np.float32
        ),
        uniforms_D1=column([draw_uniform(row.seed, row.num_output_tokens) for row in rows], np.float64),
        min_ps_D1=column([row.sampling.min_p for row in rows], np.float32),
        filtered_F=np.array(filtered, np.int64),
        num_candidates_F1=column([_num_candidates(s, vocab_size) for s in samplings], np.int64),
        has_top_k_F1=column([_has_top_k(s, vocab_size) for s in samplings], np.bool_),
        top_ps_F1=column([s.top_p for s in samplings], np.float64),
    )


def draw(logits_DV: Tensor, rows: Sequence[SamplingRow], draws: Draws, allows_host_sync: bool) -> Tensor:
    """One token per row from softmax(logits / temperature), filtered; any where a row is not finite at its maximum."""
    # The maximum is taken off first: a tiny temperature may then overflow to -inf, never to +inf or NaN.
    scaled_DV = (logits_DV - logits_DV.amax(dim=-1, keepdim=True)) / draws.temperatures_D1
    if len(draws.filtered_F):
        samplings = [row.sampling for row in rows if _has_rank_filter(row.sampling, scaled_DV.shape[1])]
        cut = _rank_filtered(take_rows(scaled_DV, draws.filtered_F), samplings, draws, allows_host_sync)
        scaled_DV = scaled_DV.index_copy(0, draws.filtered_F, cut)
    weights_DV = scaled_DV.exp()
    if any(row.sampling.min_p for row in rows):
        # The best token has weight exp(0) = 1, so min_p * max probability is min_p in these units.
        weights_DV = weights_DV * (weights_DV >= draws.min_ps_D1)
    return _inverse_cdf(weights_DV, draws.uniforms_D1)


def _inverse_cdf(weights_RV: Tensor, uniforms_R1: Tensor) -> Tensor:
    """(R,) ids: the first token whose cumulative weight, in order of id, exceeds uniform * total.

    Two levels, sums of blocks and then the tokens of one block: a running fp64 sum over the whole vocabulary
    takes longer than everything else here (1.0 ms of 1.6 ms for 152K tokens on one core). fp64 across blocks,
    because an fp32 sum of the whole would swallow the tokens of the tail.
    """
    weights_RBK = _in_blocks(weights_RV)
    cumulative_RB = _cumulative_of_blocks(weights_RBK)
    targets_R1 = uniforms_R1 * cumulative_RB[:, -1:]
    # right=True everywhere: what is found exceeds the target, thus has weight of its own.
    # Nothing exceeds it in a row that is not finite: its last block then, as an index beyond ends a GPU's process.
    block_R1 = torch.searchsorted(cumulative_RB, targets_R1, right=True).clamp(max=cumulative_RB.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, cumulative_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    row_R = torch.arange(weights_RV.shape[0], device=weights_RV.device)
    cumulative_RK = weights_RBK[row_R, block_R1.squeeze(1)].cumsum(dim=-1, dtype=torch.float64)
    offset_R1 = torch.searchsorted(cumulative_RK, targets_R1 - before_R1, right=True)
    # The two sums of a block may differ in their last bits; then its last token that has weight is meant.
    last_R1 = torch.searchsorted(cumulative_RK, cumulative_RK[:, -1:].contiguous())
    found_R = (block_R1 * _BLOCK_SIZE + torch.minimum(offset_R1, last_R1)).squeeze(1)
    return found_R.clamp(max=weights_RV.shape[1] - 1)


def _in_blocks(weights_RV: Tensor) -> Tensor:
    """(R, blocks, _BLOCK_SIZE), filled up with weight 0."""
    num_missing = -weights_RV.shape[1] % _BLOCK_SIZE
    return torch.nn.functional.pad(weights_RV, (0, num_missing)).unflatten(1, (-1, _BLOCK_SIZE))


def _cumulative_of_blocks(weights_RBK: Tensor) -> Tensor:
    """(R, blocks) fp64 running sums of the blocks' weights, each block summed in fp32."""
    return weights_RBK.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _has_top_k(sampling: Sampling, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size


def _has_rank_filter(sampling: Sampling, vocab_size: int) -> bool:
    return _has_top_k(sampling, vocab_size) or sampling.top_p < 1.0


def _num_candidates(sampling: Sampling, vocab_size: int) -> int:
    """Of the best logits, those looked at first: a nucleus rarely holds more than some hundred tokens."""
    return sampling.top_k if _has_top_k(sampling, vocab_size) else min(_NUCLEUS_GUESS, vocab_size)


def _rank_filtered(logits_FV: Tensor, samplings: Sequence[Sampling], draws: Draws, allows_host_sync: bool) -> Tensor:
    """-inf on the tokens that top_k and then top_p exclude.

    Both cut at a value, so tokens that tie with the last one kept are kept too: which of them
    a sort would put first depends on the device and the batch, the value does not.
    """
    vocab_size = logits_FV.shape[1]
    has_top_k_F1, last_F1, top_p_F1 = draws.has_top_k_F1, draws.num_candidates_F1 - 1, draws.top_ps_F1
    # A whole sort costs ten times the selection of the best.
    sorted_FC = logits_FV.topk(max(_num_candidates(s, vocab_size) for s in samplings), dim=-1).values
    cut_F1 = torch.where(has_top_k_F1, sorted_FC.gather(1, last_F1), -torch.inf)
    if any(s.top_p < 1.0 for s in samplings):
        rank_1C = torch.arange(sorted_FC.shape[1], device=logits_FV.device).unsqueeze(0)
        is_in_FC = ~has_top_k_F1 | (rank_1C <= last_F1)
        in_FC = torch.where(is_in_FC, sorted_FC, -torch.inf)
        whole_F1 = _cumulative_of_blocks(_in_blocks(logits_FV.exp()))[:, -1:]
        mass_F1 = torch.where(has_top_k_F1, in_FC.double().exp().cumsum(dim=-1)[:, -1:], whole_F1)
        nucleus_F1, is_found_F1 = _nucleus_cut(in_FC, top_p_F1 * mass_F1)
        if allows_host_sync:
            unfound = (~is_found_F1 & ~has_top_k_F1 & (top_p_F1 < 1.0)).flatten().nonzero().flatten()
            if unfound.numel():
                whole_UV = logits_FV[unfound].sort(dim=-1, descending=True).values
                nucleus_F1[unfound], _ = _nucleus_cut(whole_UV, (top_p_F1 * mass_F1)[unfound])
        elif not all(_has_top_k(s, vocab_size) for s in samplings):
            # Whether the guess was wide enough is known on the device alone.
            found_F1 = nucleus_cut_of_unsorted(logits_FV, top_p_F1 * mass_F1)
            nucleus_F1 = torch.where(has_top_k_F1, nucleus_F1, found_F1)
        cut_F1 = torch.where(top_p_F1 < 1.0, torch.maximum(cut_F1, nucleus_F1), cut_F1)
    return logits_FV.masked_fill(logits_FV < cut_F1, -torch.inf)


def _nucleus_cut(sorted_RC: Tensor, mass_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest logit kept when every token is kept before which less than `mass` lies; the best one always.

    sorted_RC: descending. Returns (R, 1) cuts and whether the mass was reached within C.
    """
    weights_RC = sorted_RC.double().exp()
    cumulative_RC = weights_RC.cumsum(dim=-1)
    num_kept_R1 = (cumulative_RC - weights_RC < mass_R1).sum(dim=-1, keepdim=True).clamp(min=1)
    return sorted_RC.gather(1, num_kept_R1 - 1), cumulative_RC[:, -1:] >= mass_R1


def nucleus_cut_of_unsorted(logits_RV: Tensor, mass_R1: Tensor) -> Tensor:
    """`_nucleus_cut` without a sort, (R, 1): the least of the row's logits above which less than `mass` lies.

    logits_RV: fp32, at most 0. What lies above a threshold changes only at the row's own logits, so halving the range
    of fp32's bit patterns 31 times ends at one of them exactly.
    """
    if logits_RV.is_cuda:
        from megatron_medha.kernels.triton.triton_nucleus import nucleus_cut  # torch brings Triton along on a GPU

        return nucleus_cut(logits_RV, mass_R1)
    weights_RV = logits_RV.exp()
    # In the order of their bit patterns, whose least is the best logit's.
    bits_RV = logits_RV.abs().view(torch.int32)
    low_R1 = torch.zeros_like(mass_R1, dtype=torch.int32)
    high_R1 = bits_RV.amax(dim=-1, keepdim=True)
    for _ in range(31):
        middle_R1 = low_R1 + (high_R1 - low_R1 + 1) // 2
        above_R1 = torch.where(bits_RV < middle_R1, weights_RV, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        is_kept_R1 = above_R1 < mass_R1
        low_R1 = torch.where(is_kept_R1, middle_R1, low_R1)
        high_R1 = torch.where(is_kept_R1, high_R1, middle_R1 - 1)
    return low_R1.view(torch.float32).neg()
