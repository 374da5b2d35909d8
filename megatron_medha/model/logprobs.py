"""Log-probabilities of tokens under the raw distribution of the model, and of the best ones beside them.

Tensor letters: T tokens, R rows, N best ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_medha.core.sampling import TokenLogprobs


@torch.inference_mode()
def prompt_logprobs(logits_TV: Tensor, next_token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probability of each prompt token under the logits of the position before it.

    logits_TV: any float dtype, so few rows that a copy in fp32 fits; padding columns past the true vocabulary already
    cut off by the caller.
    next_token_ids: (T,) integers, the tokens that follow. Positions with NaN logits give NaN log-probabilities.
    """
    token_ids_T = next_token_ids.to(logits_TV.device, torch.int64)
    found = token_logprobs(logits_TV.float(), token_ids_T, num_top, allows_host_sync=True)
    return found.listed([num_top] * len(token_ids_T))


class Logprobs(NamedTuple):
    """Of one token per row, and of the best N."""

    own_R: Tensor      # fp32
    ranks_R: Tensor    # int64, from 1
    top_RN: Tensor     # fp32
    top_ids_RN: Tensor  # int64
    token_ids_R: Tensor

    @property
    def flat(self) -> list[Tensor]:
        """One dimension each."""
        return [values.flatten() for values in self]

    @classmethod
    def of_flat(cls, numbers: Tensor, num_rows: int) -> Logprobs:
        """From `flat` as int64, end to end; floating point numbers as the bits of fp64."""
        num_top = (len(numbers) // num_rows - 3) // 2
        own, ranks, top, top_ids, token_ids = numbers.split(
            [num_rows, num_rows, num_rows * num_top, num_rows * num_top, num_rows]
        )
        shape = (num_rows, num_top)
        return cls(own.view(torch.float64), ranks, top.view(torch.float64).view(shape), top_ids.view(shape), token_ids)

    def listed(self, nums_top: Sequence[int]) -> list[TokenLogprobs]:
        """By row, with the best nums_top[r]."""
        own, ranks, top, top_ids, token_ids = (values.tolist() for values in self)
        return [
            TokenLogprobs(token_ids[r], own[r], ranks[r], tuple(zip(top_ids[r][:wanted], top[r][:wanted], strict=True)))
            for r, wanted in enumerate(nums_top)
        ]


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, num_top: int, allows_host_sync: bool) -> Logprobs:
    """Equal tokens get bit-equal numbers in both places."""
    logsumexp_R1 = row_logsumexp(logits_RV)
    own_R1 = logits_RV.gather(1, token_ids_R.unsqueeze(1))
    ranks_R = (logits_RV > own_R1).sum(dim=-1) + 1
    best_RN, ids_RN = _stable_topk(logits_RV, min(num_top, logits_RV.shape[1]), allows_host_sync)
    return Logprobs((own_R1 - logsumexp_R1).squeeze(1), ranks_R, best_RN - logsumexp_R1, ids_RN, token_ids_R)


def row_logsumexp(logits_RV: Tensor) -> Tensor:
    """Of each row, [R, 1]; its bits depend neither on the rows beside it nor on the number of threads."""
    if len(logits_RV) == 1 and logits_RV.device.type == "cpu":
        # torch cuts the sum of a lone row into a part for each thread: additions in another order than beside others.
        return logits_RV.expand(2, -1).logsumexp(dim=-1, keepdim=True)[:1]
    return logits_RV.logsumexp(dim=-1, keepdim=True)


def _stable_topk(logits_RV: Tensor, num_top: int, allows_host_sync: bool) -> tuple[Tensor, Tensor]:
    """The num_top best values and ids of each row; equal values in order of id.

    topk alone leaves that order open, and bf16 logits tie often.
    """
    if num_top == 0:
        return logits_RV[:, :0], torch.empty_like(logits_RV[:, :0], dtype=torch.int64)
    if not allows_host_sync:
        values_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
        return values_RV[:, :num_top], ids_RV[:, :num_top]
    num_seen = min(num_top + 1, logits_RV.shape[1])
    values_RN, ids_RN = logits_RV.topk(num_seen, dim=-1)
    for r in (values_RN[:, 1:] == values_RN[:, :-1]).any(dim=-1).nonzero().flatten().tolist():
        candidates = (~(logits_RV[r] < values_RN[r, -1])).nonzero().flatten()  # NaN too, as topk has it first
        order = logits_RV[r, candidates].argsort(descending=True, stable=True)[:num_seen]
        ids_RN[r] = candidates[order]
    return values_RN[:, :num_top], ids_RN[:, :num_top]
