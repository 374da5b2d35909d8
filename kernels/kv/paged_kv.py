"""KV of one layer in blocks, as the GPU kernels read it: head-major inside a block, optionally in e4m3 with scales.

Shapes: N blocks of the pool, K key/value heads, P tokens per block, D head dim.
A (block, head) is one contiguous tile [P, D], which the tensor memory accelerator loads as it lies; flash-attn takes
the view [N, P, K, D] of the same memory, as it only asks for a contiguous last dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# tl.dot wants at least 16 keys, and a block is at least one inner step of the kernel.
_MIN_BLOCK_SIZE = 16
_MAX_HEAD_DIM = 576  # of a latent vector with its positions


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of one layer, and with e4m3 the power-of-two factors that stored values are multiplied by."""

    k_NKPD: Tensor
    v_NKPD: Tensor
    k_scale_NK: Tensor | None = None  # fp32
    v_scale_NK: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors that are there, each once, as the CPU backends' LayerKV gives them."""
        tensors = (self.k_NKPD, self.k_scale_NK) if self.v_NKPD is self.k_NKPD else (
            self.k_NKPD, self.v_NKPD, self.k_scale_NK, self.v_scale_NK
        )  # fmt: skip
        return (tensor for tensor in tensors if tensor is not None)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.k_NKPD.shape[2]

    @property
    def is_quantised(self) -> bool:
        """Whether it is stored in e4m3."""
        return self.k_scale_NK is not None

    def check(self, query_dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the kernels can take it beside queries of that dtype on that device."""
        if self.k_NKPD.shape != self.v_NKPD.shape or not self.k_NKPD.is_contiguous() or not self.v_NKPD.is_contiguous():
            raise ValueError(f"keys {tuple(self.k_NKPD.shape)} and values {tuple(self.v_NKPD.shape)} are not one pool")
        check_pool_shape(self.block_size, self.k_NKPD.shape[3])
        stored = E4M3 if self.is_quantised else query_dtype
        if self.k_NKPD.dtype != stored or self.v_NKPD.dtype != stored:
            raise ValueError(f"the pool holds {self.k_NKPD.dtype}, not {stored} (queries are {query_dtype})")
        for scale in (self.k_scale_NK, self.v_scale_NK):
            if self.is_quantised and (
                scale is None or scale.shape != self.k_NKPD.shape[:2] or scale.dtype != torch.float32
            ):
                raise ValueError("an e4m3 pool needs fp32 scales [N, K] for keys and for values")
        if self.k_NKPD.device != device:
            raise ValueError(f"the pool is on {self.k_NKPD.device}, queries on {device}")


def check_pool_shape(block_size: int, head_dim: int) -> None:
    """Raises ValueError for blocks and heads the kernels have no tiles for."""
    if block_size < _MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size={block_size} must be a power of two from {_MIN_BLOCK_SIZE} on")
    if head_dim % 8 or not 16 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} must be a multiple of 8 from 16 to {_MAX_HEAD_DIM}")


def allocate_paged(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    are_values_keys: bool = False,
) -> PagedKV:
    """Uninitialised KV of one layer. dtype e4m3 comes with scales. Raises ValueError for what has no kernel.

    are_values_keys: of latent vectors, which are there once.
    """
    check_pool_shape(block_size, head_dim)
    if dtype == torch.float32 and device.type == "cuda":
        # Exact fp32 products take no tensor core: compiled for sm_90, tiles spill 6 to 12 KB a thread at head dim 128,
        # and at 256 need more shared memory than there is.
        raise ValueError("float32 keys and values have no kernel on a GPU; use model.dtype=bfloat16")
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_NKPD = torch.empty(shape, dtype=dtype, device=device)
    v_NKPD = k_NKPD if are_values_keys else torch.empty_like(k_NKPD)
    if dtype != E4M3:
        return PagedKV(k_NKPD, v_NKPD)
    k_scale_NK = torch.zeros(shape[:2], dtype=torch.float32, device=device)
    return PagedKV(k_NKPD, v_NKPD, k_scale_NK, k_scale_NK if are_values_keys else torch.zeros_like(k_scale_NK))
