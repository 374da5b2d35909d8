"""Copied blocks hold what their sources do, in every backend's layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_world import PagedSequence, World

from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.kv.paged_kv import E4M3, allocate_paged


def blocks_of(sequence: PagedSequence, block_size: int) -> torch.Tensor:
    slots = sequence.table.slots(0, sequence.table.num_slots)
    return torch.from_numpy(slots[::block_size] // block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 8, 16, 48])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_a_sequence_goes_on_over_copied_blocks(
    make_backend: Callable[[], AttentionBackend], block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    world = World(make_backend(), num_kv_heads=2, group=3, head_dim=head_dim, dtype=dtype, block_size=block_size)
    first = world.add(96, [1, 3, 96 // block_size])
    world.step([(first, 61)])
    other = world.add(96, [96 // block_size, 4])
    copied = PagedSequence(first.k_SKD, first.v_SKD, other.table, first.num_computed)
    sources_B, targets_B = (blocks_of(sequence, block_size) for sequence in (first, other))
    world.backend.copy_blocks(world.layer, sources_B, targets_B, block_size)
    world.step([(copied, 30), (first, 2)])  # compared with plain attention; what nobody has written is not a number


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_pages_are_copied_with_their_scales(dtype: torch.dtype) -> None:
    layer = allocate_paged(8, 16, 2, 32, dtype, torch.device("cpu"))
    for values in layer:
        values.view(torch.uint8).copy_(torch.randint(0, 255, values.view(torch.uint8).shape))
    before = [values.view(torch.uint8).clone() for values in layer]
    backend: AttentionBackend = AttentionBackend.__new__(type("Paged", (AttentionBackend,), {"name": "paged"}))
    backend.copy_blocks(layer, torch.tensor([1, 2]), torch.tensor([6, 4]), 16)
    for values, old in zip(layer, before, strict=True):
        expected = old[[0, 1, 2, 3, 2, 5, 1, 7]]
        assert torch.equal(values.view(torch.uint8), expected)
