"""Every CPU backend against plain attention: packed mixed batches over paged KV of every shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_world import BLOCK_SIZE, World

from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.kv.slot_table import SlotTable

MakeBackend = Callable[[], AttentionBackend]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (1, 8), (2, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_prefill_in_chunks_then_decode_is_attention_over_the_whole(
    make_backend: MakeBackend, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    world = World(make_backend(), num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype)
    sequence = world.add(160)
    for count in (33, 1, 64, 2, 50, 1, 1):
        world.step([(sequence, count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "extent_lengths",
    [
        pytest.param([60], id="one extent"),
        pytest.param([1] * 60, id="single blocks"),
        pytest.param([20, 1, 1, 30, 8], id="long and short"),
        pytest.param([1, 59], id="short then long"),
        pytest.param([17, 17, 17, 17], id="several long"),
    ],
)
def test_where_the_blocks_lie_does_not_matter(
    make_backend: MakeBackend, extent_lengths: list[int], dtype: torch.dtype
) -> None:
    world = World(make_backend(), num_kv_heads=2, group=4, head_dim=32, dtype=dtype)
    sequence = world.add(60 * BLOCK_SIZE, extent_lengths)
    for count in (300, 1, 200, 15, 1, 300, 100, 1, 1, 1):
        world.step([(sequence, count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_decodes_of_many_sequences_share_a_batch(make_backend: MakeBackend, dtype: torch.dtype) -> None:
    world = World(make_backend(), num_kv_heads=2, group=2, head_dim=64, dtype=dtype)
    decoding = [world.add(40 + i) for i in range(3)]
    long, fragmented = world.add(600), world.add(100, [1] * 7)
    world.step([(sequence, 30 + i) for i, sequence in enumerate(decoding)] + [(long, 256), (fragmented, 17)])
    world.step([(decoding[0], 1), (long, 300), (decoding[1], 1), (fragmented, 80), (decoding[2], 1)])
    world.step([(sequence, 1) for sequence in (*decoding, long, fragmented)])
    fresh = world.add(10)
    world.step([(fresh, 10), (decoding[2], 1), (long, 1)])


def test_a_sequences_output_does_not_depend_on_who_shares_its_batch(make_backend: MakeBackend) -> None:
    outputs = []
    for num_others in (0, 3):
        torch.manual_seed(0)
        world = World(make_backend(), num_kv_heads=2, group=4, head_dim=64, dtype=torch.float32)
        sequence = world.add(200)
        first = world.step([(sequence, 100)])
        others = [world.add(50) for _ in range(num_others)]
        torch.manual_seed(1)
        second = world.step([(sequence, 90), *((other, 5) for other in others)])
        outputs.append((first, second[:90]))
    for alone, shared in zip(*outputs, strict=True):
        assert torch.equal(alone, shared)


def test_shapes_that_disagree_are_refused_before_the_pool_is_touched(make_backend: MakeBackend) -> None:
    backend = make_backend()
    layer = backend.allocate(4, BLOCK_SIZE, 2, 8, torch.float32)
    table = SlotTable(BLOCK_SIZE)
    table.append([(0, 1)])
    plan = backend.plan([QueryRange(0, 3, 0, table)])
    with pytest.raises(ValueError, match="disagree"):
        backend.attend(plan, torch.zeros(3, 2, 2, 8), torch.zeros(3, 1, 8), torch.zeros(3, 1, 8), layer, 1.0)
