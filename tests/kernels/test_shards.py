"""One sequence over several shards: each attended apart, with its log-sum-exp, and merged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_world import TOLERANCE
from torch import Tensor

from megatron_medha.kernels import reference
from megatron_medha.kernels.backends import AttentionBackend, LayerKV, QueryRange
from megatron_medha.kernels.merge import merge_states
from megatron_medha.kernels.slot_table import SlotTable

BLOCK_SIZE = 16
NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 16
SCALE = HEAD_DIM**-0.5


def table_of(backend: AttentionBackend, *extents: tuple[int, int]) -> SlotTable:
    table = SlotTable(BLOCK_SIZE, backend.min_run_tokens)
    table.append(extents)
    return table


def pool(backend: AttentionBackend, dtype: torch.dtype) -> LayerKV:
    layer = backend.allocate(12, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype)
    for tensor in layer:
        tensor.fill_(torch.nan)
    return layer


def write(backend: AttentionBackend, layer: LayerKV, table: SlotTable, k_TKD: Tensor, v_TKD: Tensor) -> None:
    """Keys and values at the start of a table, as an earlier chunk writes them."""
    num_tokens = len(k_TKD)
    q_TKGD = torch.zeros(num_tokens, NUM_KV_HEADS, GROUP, HEAD_DIM, dtype=k_TKD.dtype)
    backend.attend(backend.plan([QueryRange(0, num_tokens, 0, table)]), q_TKGD, k_TKD, v_TKD, layer, SCALE)


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_attended_apart_and_merged_are_attention_over_the_whole(
    make_backend: Callable[[], AttentionBackend], num_rows: int, dtype: torch.dtype
) -> None:
    backend = make_backend()
    torch.manual_seed(0)
    shard_tokens, last_tokens = 64, 21
    num_keys = 2 * shard_tokens + last_tokens
    k_SKD, v_SKD = (torch.randn(num_keys, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    q_TKGD = torch.randn(num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM).to(dtype)
    first_new = num_keys - num_rows
    parts = []
    for shard in range(3):
        is_last = shard == 2
        layer, table = pool(backend, dtype), table_of(backend, (4, 2), (0, 2))
        start = shard * shard_tokens
        end = first_new if is_last else start + shard_tokens
        write(backend, layer, table, k_SKD[start:end], v_SKD[start:end])
        before = layer.k.clone()
        plan = backend.plan([QueryRange(0, num_rows, end - start, table, is_written=is_last)])
        parts.append(backend.attend_with_lse(plan, q_TKGD, k_SKD[first_new:], v_SKD[first_new:], layer, SCALE))
        assert is_last == (not torch.equal(layer.k.nan_to_num(), before.nan_to_num()))
    out_THD, lse_TH = merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    expected_THD, expected_TH = reference.attention(q_TKGD.flatten(1, 2), k_SKD, v_SKD, SCALE, is_causal=True)
    torch.testing.assert_close(out_THD.double(), expected_THD, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse_TH.double(), expected_TH, atol=TOLERANCE[dtype], rtol=0)


def test_a_batch_of_shards_some_written_here_and_some_elsewhere_is_each_of_them_alone(
    make_backend: Callable[[], AttentionBackend],
) -> None:
    backend = make_backend()
    torch.manual_seed(1)
    layer = pool(backend, torch.float32)
    tables = [table_of(backend, (first_block, 4)) for first_block in (0, 4, 8)]
    for table in tables[:2]:
        write(backend, layer, table, *torch.randn(2, 64, NUM_KV_HEADS, HEAD_DIM))
    ranges = [
        QueryRange(0, 3, 30, tables[0]),
        QueryRange(3, 4, 64, tables[1], is_written=False),
        QueryRange(7, 1, 0, tables[2]),
    ]
    q_TKGD = torch.randn(8, NUM_KV_HEADS, GROUP, HEAD_DIM)
    k_TKD, v_TKD = torch.randn(2, 8, NUM_KV_HEADS, HEAD_DIM)
    together = backend.attend_with_lse(backend.plan(ranges), q_TKGD, k_TKD, v_TKD, layer, SCALE)
    for found in ranges:
        rows = slice(found.first_row, found.first_row + found.num_rows)
        plan = backend.plan([found._replace(first_row=0)])
        alone = backend.attend_with_lse(plan, q_TKGD[rows], k_TKD[rows], v_TKD[rows], layer, SCALE)
        for both, single in zip(together, alone, strict=True):
            torch.testing.assert_close(both[rows], single, atol=1e-6, rtol=0)
