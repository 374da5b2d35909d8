"""A stand-in for FlashAttention-3's Python package: the same signature, the same demands, and plain attention.

Signature and return values are those of flash_attn_interface.py, 3.0.0 (the package's own file, read and not run).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_medha.kernels.attention import reference

HEAD_DIMS = 256  # at most; rounded up to one of 64, 96, 128, 192, 256
calls: list[dict[str, Any]] = []


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Paged and with lengths per sequence only, as nothing else is called here."""
    assert q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == v_cache.dtype == q.dtype
    assert q.dim() == 3 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, cached_dim = k_cache.shape
    assert head_dim == cached_dim <= HEAD_DIMS and head_dim % 8 == 0 and num_heads % num_kv_heads == 0
    assert cu_seqlens_q is not None and isinstance(cache_seqlens, Tensor) and page_table is not None
    for tensor in (cu_seqlens_q, cache_seqlens, page_table):
        assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1 and tensor.device == q.device
    num_sequences = cache_seqlens.shape[0]
    assert cu_seqlens_q.shape == (num_sequences + 1,) and page_table.shape[0] == num_sequences
    first_rows, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    counts = [end - begin for begin, end in zip(first_rows, first_rows[1:])]
    assert first_rows[0] == 0 and first_rows[-1] == num_tokens and min(counts) >= 0, "sequences do not cover the rows"
    assert max_seqlen_q is not None and max(counts) <= max_seqlen_q
    assert max(lengths) <= page_table.shape[1] * page_size, "pages beyond the table"
    assert pack_gqa is None or not pack_gqa or num_heads > num_kv_heads
    calls.append({
        "causal": causal, "num_sequences": num_sequences, "max_seqlen_q": max_seqlen_q, "width": page_table.shape[1],
        "pack_gqa": pack_gqa,
    })  # fmt: skip
    out = torch.full_like(q, torch.nan)
    lse = torch.full((num_heads, num_tokens), torch.nan)
    for begin, end, length, pages in zip(first_rows, first_rows[1:], lengths, page_table):
        used = pages[: -(-length // page_size)].long()
        keys, values = (pool[used].flatten(0, 1)[:length] for pool in (k_cache, v_cache))
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        out[begin:end], lse_TH = reference.attention(q[begin:end], keys, values, scale, is_causal=causal)
        lse[:, begin:end] = lse_TH.T.masked_fill(lse_TH.T.isneginf(), torch.inf)  # of a row without a key
    nothing = torch.tensor([])
    return (out, lse, nothing, nothing) if return_softmax_lse else out


def install() -> None:
    """Let `import flash_attn_interface` find this module."""
    module = ModuleType("flash_attn_interface")
    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    module.__dict__["flash_attn_with_kvcache"] = flash_attn_with_kvcache
    sys.modules["flash_attn_interface"] = module
