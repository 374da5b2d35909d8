"""Merging partial attention over disjoint KV ranges by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(out_RTHD: Tensor, lse_RTH: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over R disjoint KV shards, merged into attention over their union.

    out_RTHD: each row normalised over its own shard; ignored where the shard is empty.
    lse_RTH:  fp32, natural log-sum-exp of the scaled scores; -inf where a shard is empty.
    Returns (out_THD, lse_TH), same dtypes; 0 and -inf where every shard is empty, never NaN.
    T and H may be any dimensions between R and D. Raises ValueError if they disagree.
    Source: online softmax, arXiv:1805.02867; plain version in kernels/attention/reference.py.
    """
    if out_RTHD.shape[:-1] != lse_RTH.shape:
        raise ValueError(f"outputs {tuple(out_RTHD.shape)} and log-sum-exps {tuple(lse_RTH.shape)} disagree")
    max_TH = lse_RTH.amax(dim=0)
    max_TH = max_TH.masked_fill(max_TH.isneginf(), 0.0)
    weight_RTH = torch.exp(lse_RTH - max_TH)
    total_TH = weight_RTH.sum(dim=0)
    share_RTH = weight_RTH / total_TH.masked_fill(total_TH == 0.0, 1.0)
    # An empty shard's output may be anything, NaN included: 0 * NaN would spoil the sum.
    parts_RTHD = out_RTHD.float().masked_fill((weight_RTH == 0.0)[..., None], 0.0)
    out_THD = (parts_RTHD * share_RTH[..., None]).sum(dim=0)
    return out_THD.to(out_RTHD.dtype), max_TH + torch.log(total_TH)


def merge_outputs(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The output of `merge_states` of a list of non-empty (out_THD, lse_TH)."""
    if len(parts) != 2:
        return merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))[0]
    (first_THD, first_lse_TH), (second_THD, second_lse_TH) = parts
    share_TH1 = torch.sigmoid(second_lse_TH - first_lse_TH).unsqueeze(-1)
    return torch.lerp(first_THD.float(), second_THD.float(), share_TH1).to(first_THD.dtype)


def with_sinks(out_THD: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one more score in each softmax, which brings no value: (out_THD, lse_TH) of partial attention.

    sinks_H: that score, of each head, or [T, H]. Of several shards each takes its part of the softmax: score - log(R).
    """
    sinks_TH = sinks_H.float().expand_as(lse_TH)
    share_TH1 = torch.sigmoid(lse_TH - sinks_TH).unsqueeze(-1)
    # An empty shard's output may be anything, NaN included.
    out_THD = (out_THD.float() * share_TH1).masked_fill(share_TH1 == 0.0, 0.0).to(out_THD.dtype)
    return out_THD, torch.logaddexp(lse_TH, sinks_TH)
