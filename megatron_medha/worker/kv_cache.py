"""The KV memory of one rank: all layers' blocks, allocated once."""

from __future__ import annotations

import torch

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV


def num_blocks_that_fit(
    kv_memory_bytes: int,
    *,
    block_size: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    are_values_keys: bool = False,
) -> int:
    """Blocks of `block_size` tokens that fit into the memory, over all layers of this rank.

    are_values_keys: one tensor of a layer is both.
    Raises ConfigError if not even one does.
    """
    block_bytes = num_layers * num_kv_heads * head_dim * block_size * dtype.itemsize
    if dtype == torch.float8_e4m3fn:
        block_bytes += num_layers * num_kv_heads * 4  # a scale per block and head, fp32
    block_bytes *= 1 if are_values_keys else 2
    num_blocks = kv_memory_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"kv_memory_bytes={kv_memory_bytes} holds no block of {block_size} tokens; one takes {block_bytes} bytes"
        )
    return num_blocks


def allocate_kv(
    backend: AttentionBackend,
    num_blocks: int,
    *,
    block_size: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    are_values_keys: bool = False,
) -> tuple[LayerKV, ...]:
    """KV of every layer, uninitialised. On CPU the operating system hands out the pages when they are first written.

    Raises ConfigError if the memory is not to be had.
    """
    try:
        sizes = (num_blocks, block_size, num_kv_heads, head_dim, dtype)
        if are_values_keys:
            assert backend.stores_latents_once
            return tuple(backend.allocate(*sizes, True) for _ in range(num_layers))  # type: ignore[call-arg]
        return tuple(backend.allocate(*sizes) for _ in range(num_layers))
    except ValueError as error:  # blocks or heads the backend has no kernel for
        raise ConfigError(f"attention_backend={backend.name}: {error}") from error
    except RuntimeError as error:  # torch has no narrower type for a refused host allocation
        raise ConfigError(f"{num_blocks} KV blocks of {block_size} tokens do not fit into memory: {error}") from error
