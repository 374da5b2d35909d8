"""Plain attention over KV and its merge, in the arithmetic of its inputs: what every backend is compared with.

Shapes: T query tokens, S key tokens, H query heads, K key/value heads, D head dim, R shards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale: float, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of T queries over S keys, H a multiple of K (grouped queries), computed in fp64.

    is_causal: aligned at the end: query t sees keys [0, S - T + t]. Otherwise every query sees every key.
    Returns (out_THD, lse_TH): fp64; lse is the natural log-sum-exp of the scaled scores.
    A query that sees no key has output 0 and lse -inf.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_keys, num_kv_heads, _ = k_SKD.shape
    group = num_heads // num_kv_heads
    k_SHD = k_SKD.double().repeat_interleave(group, dim=1)
    v_SHD = v_SKD.double().repeat_interleave(group, dim=1)
    scores_HTS = torch.einsum("thd,shd->hts", q_THD.double(), k_SHD) * scale
    if is_causal:
        last_key_T = torch.arange(num_tokens, device=q_THD.device) + num_keys - num_tokens
        hidden_TS = torch.arange(num_keys, device=q_THD.device)[None, :] > last_key_T[:, None]
        scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    lse_HT = torch.logsumexp(scores_HTS, dim=-1) if num_keys else scores_HTS.new_full(
        (num_heads, num_tokens), -torch.inf
    )
    weights_HTS = torch.exp(scores_HTS - lse_HT.masked_fill(lse_HT.isneginf(), 0.0)[..., None])
    return torch.einsum("hts,shd->thd", weights_HTS, v_SHD), lse_HT.T.contiguous()


def merge_states(out_RTHD: Tensor, lse_RTH: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over R disjoint shards, merged into attention over their union, token by token, in fp64.

    Returns (out_THD, lse_TH), fp64; 0 and -inf where every shard is empty.
    Source: online softmax, arXiv:1805.02867.
    """
    num_shards, num_tokens, num_heads, head_dim = out_RTHD.shape
    merged_THD = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float64)
    merged_lse_TH = torch.full((num_tokens, num_heads), -torch.inf, dtype=torch.float64)
    for token in range(num_tokens):
        for head in range(num_heads):
            full = [r for r in range(num_shards) if not lse_RTH[r, token, head].isneginf()]
            if not full:
                continue
            lse_R = torch.stack([lse_RTH[r, token, head].double() for r in full])
            total = torch.logsumexp(lse_R, dim=0)
            merged_lse_TH[token, head] = total
            merged_THD[token, head] = sum(
                torch.exp(lse - total) * out_RTHD[r, token, head].double() for r, lse in zip(full, lse_R, strict=True)
            )
    return merged_THD, merged_lse_TH
