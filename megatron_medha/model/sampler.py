"""Choosing next tokens from logits, and their log-probabilities. Stop handling and detokenising are elsewhere.

Tensor letters: T tokens, R rows (one per request), V vocabulary.

Order of one draw: logit_bias, stop tokens masked while the output is shorter than min_output_tokens,
repetition, presence and frequency penalties, temperature, top_k, top_p, min_p, one inverse-CDF draw.
Log-probabilities describe the raw distribution of the model, before every step of that list
(vLLM calls this "raw_logprobs" and has it as its default too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_medha.core.sampling import Sampling, TokenLogprobs

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# fp32 copies of prompt logits are made in slices of this many elements: 64 MiB each.
_PROMPT_SLICE_ELEMENTS = 1 << 24
_MIN_TEMPERATURE = 1e-30
_BLOCK_SIZE = 256
_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing one request's next token depends on, besides its logits."""

    sampling: Sampling
    prompt_ids: Tensor         # (num_prompt_tokens,), any integer dtype and device; read by the repetition penalty
    output_ids: Sequence[int]  # tokens emitted so far; read by the penalties
    seed: int
    num_output_tokens: int     # emitted so far, hence also the index of this draw


class SampledRow(NamedTuple):
    """The chosen token and, when asked for, its log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None


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


class Sampler:
    """Chooses next tokens for rows of logits. Holds no state between calls."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        """Columns of the logits past vocab_size are padding and are never looked at."""
        self._vocab_size = vocab_size
        self._device = torch.device(device)

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledRow | None]:
        """One token per row; None where the logits hold NaN, +inf or nothing finite.

        logits_RV: any float dtype, at least vocab_size columns; left unchanged.
        A None row is the fault of that request alone: the caller fails it and keeps the others.
        """
        assert logits_RV.shape[0] == len(rows), f"{logits_RV.shape[0]} rows of logits for {len(rows)} requests"
        if not rows:
            return []
        raw_RV = logits_RV[:, : self._vocab_size].float()
        edited_RV = self._edited(raw_RV, rows)
        # max carries NaN and +inf along, so a look at every logit is saved.
        best_R, greedy_R = edited_RV.max(dim=-1)
        # One look for both: on a GPU every look waits for all that is under way.
        token_ids, is_sound = torch.stack((greedy_R, torch.isfinite(best_R).to(greedy_R.dtype))).tolist()
        drawn = [index for index, row in enumerate(rows) if not row.sampling.is_greedy and is_sound[index]]
        if drawn:
            chosen = _draw(_take_rows(edited_RV, drawn), [rows[index] for index in drawn])
            for index, token_id in zip(drawn, chosen, strict=True):
                token_ids[index] = token_id
        logprobs = self._logprobs(raw_RV, rows, token_ids, is_sound)
        return [
            SampledRow(token_id, logprobs.get(index)) if is_sound[index] else None
            for index, token_id in enumerate(token_ids)
        ]

    @torch.inference_mode()
    def best(self, logits_RV: Tensor) -> list[SampledRow | None]:
        """`sample` for rows whose sampling `takes_the_best`, without a look at each row's parameters."""
        best_R, greedy_R = logits_RV[:, : self._vocab_size].float().max(dim=-1)
        token_ids, is_sound = torch.stack((greedy_R, torch.isfinite(best_R).to(greedy_R.dtype))).tolist()
        return [
            SampledRow(token_id, None) if sound else None
            for token_id, sound in zip(token_ids, is_sound, strict=True)
        ]

    def _edited(self, raw_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """The logits after bias, stop masking and penalties; raw_RV itself when no row asks for any."""
        biased = [(r, token_id, bias) for r, row in enumerate(rows) for token_id, bias in row.sampling.logit_bias]
        masked = [
            (r, token_id)
            for r, row in enumerate(rows)
            if row.num_output_tokens < row.sampling.min_output_tokens
            for token_id in row.sampling.stop_token_ids
            if token_id < self._vocab_size
        ]
        penalised = [r for r, row in enumerate(rows) if _has_penalty(row.sampling)]
        if not (biased or masked or penalised):
            return raw_RV
        edited_RV = raw_RV.clone()
        if biased:
            row_ids, token_ids, biases = zip(*biased, strict=True)
            at = (self._tensor(row_ids), self._tensor(token_ids))
            edited_RV.index_put_(at, self._tensor(biases, torch.float32), accumulate=True)
        if masked:
            row_ids, token_ids = zip(*masked, strict=True)
            edited_RV[self._tensor(row_ids), self._tensor(token_ids)] = -torch.inf
        if penalised:
            at_P = self._tensor(penalised)
            edited_RV[at_P] = self._penalised(edited_RV[at_P], [rows[r] for r in penalised])
        return edited_RV

    def _penalised(self, logits_PV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Repetition over prompt and output, then frequency and presence over the output."""
        counts_PV = torch.zeros_like(logits_PV)
        is_seen_PV = torch.zeros_like(logits_PV, dtype=torch.bool)
        for p, row in enumerate(rows):
            if len(row.output_ids):
                output_ids = self._tensor(row.output_ids)
                counts_PV[p] = torch.bincount(output_ids, minlength=self._vocab_size)
            if row.sampling.repetition_penalty != 1.0:
                is_seen_PV[p, row.prompt_ids.to(self._device, torch.int64)] = True
        is_output_PV = counts_PV > 0
        repetition_P1 = self._column([row.sampling.repetition_penalty for row in rows])
        frequency_P1 = self._column([row.sampling.frequency_penalty for row in rows])
        presence_P1 = self._column([row.sampling.presence_penalty for row in rows])
        scale_PV = torch.where(logits_PV > 0, 1.0 / repetition_P1, repetition_P1)
        logits_PV = torch.where(is_seen_PV | is_output_PV, logits_PV * scale_PV, logits_PV)
        return logits_PV - frequency_P1 * counts_PV - presence_P1 * is_output_PV

    def _logprobs(
        self, raw_RV: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int], is_sound: Sequence[bool]
    ) -> dict[int, TokenLogprobs]:
        """By row, for the rows that asked; nothing is computed when none did."""
        asking = [r for r, row in enumerate(rows) if row.sampling.num_logprobs is not None and is_sound[r]]
        if not asking:
            return {}
        nums_top = [rows[r].sampling.num_logprobs or 0 for r in asking]
        ids = self._tensor([token_ids[r] for r in asking])
        found = _token_logprobs(_take_rows(raw_RV, asking), ids, nums_top)
        return dict(zip(asking, found, strict=True))

    def _tensor(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return self._tensor(values, torch.float32).unsqueeze(1)


def takes_the_best(sampling: Sampling) -> bool:
    """Whether the next token is always the one with the largest logit of the model, and nothing else is asked."""
    is_edited = sampling.logit_bias or sampling.min_output_tokens or _has_penalty(sampling)
    return sampling.is_greedy and not is_edited and sampling.num_logprobs is None


@torch.inference_mode()
def prompt_logprobs(logits_TV: Tensor, next_token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probability of each prompt token under the logits of the position before it.

    logits_TV: any float dtype; padding columns past the true vocabulary already cut off by the caller.
    next_token_ids: (T,) integers, the tokens that follow. Positions with NaN logits give NaN log-probabilities.
    """
    num_tokens, vocab_size = logits_TV.shape
    step = max(1, _PROMPT_SLICE_ELEMENTS // vocab_size)
    next_token_ids = next_token_ids.to(logits_TV.device, torch.int64)
    found: list[TokenLogprobs] = []
    for first in range(0, num_tokens, step):
        part_TV = logits_TV[first : first + step].float()
        found += _token_logprobs(part_TV, next_token_ids[first : first + step], [num_top] * part_TV.shape[0])
    return found


def _has_penalty(sampling: Sampling) -> bool:
    has_output_penalty = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    return sampling.repetition_penalty != 1.0 or has_output_penalty


def _take_rows(logits_RV: Tensor, indices: Sequence[int]) -> Tensor:
    """Those rows; no copy when it is all of them."""
    if len(indices) == logits_RV.shape[0]:
        return logits_RV
    return logits_RV[torch.tensor(indices, device=logits_RV.device)]


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token per row from softmax(logits / temperature), filtered; rows are finite at their maximum."""
    # Below the floor every temperature gives the greedy token, but fp32 would make it 0 and 0 / 0 is NaN.
    temperatures = torch.tensor(
        [max(row.sampling.temperature, _MIN_TEMPERATURE) for row in rows], device=logits_RV.device
    )
    # The maximum is taken off first: a tiny temperature may then overflow to -inf, never to +inf or NaN.
    scaled_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperatures.unsqueeze(1)
    filtered = [r for r, row in enumerate(rows) if _has_rank_filter(row.sampling, scaled_RV.shape[1])]
    if filtered:
        part = _take_rows(scaled_RV, filtered)
        cut = _rank_filtered(part, [rows[r].sampling for r in filtered])
        scaled_RV = scaled_RV.index_copy(0, torch.tensor(filtered, device=scaled_RV.device), cut)
    weights_RV = scaled_RV.exp()
    min_ps = [row.sampling.min_p for row in rows]
    if any(min_ps):
        # The best token has weight exp(0) = 1, so min_p * max probability is min_p in these units.
        floor_R1 = torch.tensor(min_ps, device=weights_RV.device).unsqueeze(1)
        weights_RV = weights_RV * (weights_RV >= floor_R1)
    uniforms = torch.tensor(
        [draw_uniform(row.seed, row.num_output_tokens) for row in rows], dtype=torch.float64, device=weights_RV.device
    )
    return _inverse_cdf(weights_RV, uniforms.unsqueeze(1)).tolist()


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
    block_R1 = torch.searchsorted(cumulative_RB, targets_R1, right=True)
    before_R1 = torch.where(block_R1 > 0, cumulative_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    row_R = torch.arange(weights_RV.shape[0], device=weights_RV.device)
    cumulative_RK = weights_RBK[row_R, block_R1.squeeze(1)].cumsum(dim=-1, dtype=torch.float64)
    offset_R1 = torch.searchsorted(cumulative_RK, targets_R1 - before_R1, right=True)
    # The two sums of a block may differ in their last bits; then its last token that has weight is meant.
    last_R1 = torch.searchsorted(cumulative_RK, cumulative_RK[:, -1:].contiguous())
    return (block_R1 * _BLOCK_SIZE + torch.minimum(offset_R1, last_R1)).squeeze(1)


def _in_blocks(weights_RV: Tensor) -> Tensor:
    """(R, blocks, _BLOCK_SIZE), filled up with weight 0."""
    num_missing = -weights_RV.shape[1] % _BLOCK_SIZE
    return torch.nn.functional.pad(weights_RV, (0, num_missing)).unflatten(1, (-1, _BLOCK_SIZE))


def _cumulative_of_blocks(weights_RBK: Tensor) -> Tensor:
    """(R, blocks) fp64 running sums of the blocks' weights, each block summed in fp32."""
    return weights_RBK.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _has_rank_filter(sampling: Sampling, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def _rank_filtered(logits_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """-inf on the tokens that top_k and then top_p exclude.

    Both cut at a value, so tokens that tie with the last one kept are kept too: which of them
    a sort would put first depends on the device and the batch, the value does not.
    """
    vocab_size = logits_RV.shape[1]
    has_top_k = [0 < s.top_k < vocab_size for s in samplings]
    # A nucleus rarely holds more than some hundred tokens, and a whole sort costs ten times that selection.
    sought = [s.top_k if limited else _NUCLEUS_GUESS for s, limited in zip(samplings, has_top_k, strict=True)]
    sorted_RC = logits_RV.topk(min(max(sought), vocab_size), dim=-1).values
    last_R1 = torch.tensor(sought, device=logits_RV.device).clamp(max=sorted_RC.shape[1]).unsqueeze(1) - 1
    has_top_k_R1 = torch.tensor(has_top_k, device=logits_RV.device).unsqueeze(1)
    cut_R1 = torch.where(has_top_k_R1, sorted_RC.gather(1, last_R1), -torch.inf)
    if any(s.top_p < 1.0 for s in samplings):
        top_p_R1 = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=logits_RV.device).unsqueeze(1)
        rank_1C = torch.arange(sorted_RC.shape[1], device=logits_RV.device).unsqueeze(0)
        is_in_RC = ~has_top_k_R1 | (rank_1C <= last_R1)
        in_RC = torch.where(is_in_RC, sorted_RC, -torch.inf)
        whole_R1 = _cumulative_of_blocks(_in_blocks(logits_RV.exp()))[:, -1:]
        mass_R1 = torch.where(has_top_k_R1, in_RC.double().exp().cumsum(dim=-1)[:, -1:], whole_R1)
        nucleus_R1, is_found_R1 = _nucleus_cut(in_RC, top_p_R1 * mass_R1)
        unfound = (~is_found_R1 & ~has_top_k_R1 & (top_p_R1 < 1.0)).flatten().nonzero().flatten()
        if unfound.numel():
            whole_UV = logits_RV[unfound].sort(dim=-1, descending=True).values
            nucleus_R1[unfound], _ = _nucleus_cut(whole_UV, (top_p_R1 * mass_R1)[unfound])
        cut_R1 = torch.where(top_p_R1 < 1.0, torch.maximum(cut_R1, nucleus_R1), cut_R1)
    return logits_RV.masked_fill(logits_RV < cut_R1, -torch.inf)


def _nucleus_cut(sorted_RC: Tensor, mass_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest logit kept when every token is kept before which less than `mass` lies; the best one always.

    sorted_RC: descending. Returns (R, 1) cuts and whether the mass was reached within C.
    """
    weights_RC = sorted_RC.double().exp()
    cumulative_RC = weights_RC.cumsum(dim=-1)
    num_kept_R1 = (cumulative_RC - weights_RC < mass_R1).sum(dim=-1, keepdim=True).clamp(min=1)
    return sorted_RC.gather(1, num_kept_R1 - 1), cumulative_RC[:, -1:] >= mass_R1


def _token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, nums_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of one token per row and the best nums_top[r]; equal tokens get bit-equal numbers in both places."""
    logsumexp_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    own_R1 = logits_RV.gather(1, token_ids_R.unsqueeze(1))
    ranks = ((logits_RV > own_R1).sum(dim=-1) + 1).tolist()
    own = (own_R1 - logsumexp_R1).squeeze(1).tolist()
    num_top = min(max(nums_top), logits_RV.shape[1])
    best_ids: list[list[int]] = [[]] * len(own)
    best: list[list[float]] = [[]] * len(own)
    if num_top:
        best_RN, ids_RN = _stable_topk(logits_RV, num_top)
        best_ids, best = ids_RN.tolist(), (best_RN - logsumexp_R1).tolist()
    return [
        TokenLogprobs(token_id, own[r], ranks[r], tuple(zip(best_ids[r][:wanted], best[r][:wanted], strict=True)))
        for r, (token_id, wanted) in enumerate(zip(token_ids_R.tolist(), nums_top, strict=True))
    ]


def _stable_topk(logits_RV: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The num_top best values and ids of each row; equal values in order of id.

    topk alone leaves that order open, and bf16 logits tie often.
    """
    num_seen = min(num_top + 1, logits_RV.shape[1])
    values_RN, ids_RN = logits_RV.topk(num_seen, dim=-1)
    for r in (values_RN[:, 1:] == values_RN[:, :-1]).any(dim=-1).nonzero().flatten().tolist():
        candidates = (logits_RV[r] >= values_RN[r, -1]).nonzero().flatten()
        order = logits_RV[r, candidates].argsort(descending=True, stable=True)[:num_seen]
        ids_RN[r] = candidates[order]
    return values_RN[:, :num_top], ids_RN[:, :num_top]
