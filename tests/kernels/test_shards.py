"""One sequence's keys and values in shards of several pools: attended apart, then merged."""

from __future__ import annotations

import pytest
import torch
from paged_world import BLOCK_SIZE, TOLERANCE

from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.attention.merge import merge_states
from megatron_medha.kernels.choose_backend import attention_backend
from megatron_medha.kernels.kv.slot_table import SlotTable

HEAD_DIM = 16


@pytest.fixture(params=["aten", "native"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    try:
        return attention_backend(request.param, torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


def table_of(backend: AttentionBackend, extents: list[tuple[int, int]]) -> SlotTable:
    table = SlotTable(BLOCK_SIZE)
    table.append(extents)
    return table


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_attended_apart_and_merged_are_attention_over_the_whole(
    backend: AttentionBackend, num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shard_tokens, last_tokens, num_kv_heads, group = 64, 21, 2, 3
    num_keys = 2 * shard_tokens + last_tokens
    k_SKD, v_SKD = (torch.randn(num_keys, num_kv_heads, HEAD_DIM).to(dtype) for _ in range(2))
    q_TKGD = torch.randn(num_rows, num_kv_heads, group, HEAD_DIM).to(dtype)
    scale, first_new = HEAD_DIM**-0.5, num_keys - num_rows
    parts = []
    for shard in range(3):
        is_last = shard == 2
        layer = backend.allocate(8, BLOCK_SIZE, num_kv_heads, HEAD_DIM, dtype)
        for tensor in layer:
            tensor.fill_(torch.nan)  # a kernel that reads a slot that was never written will show it
        table = table_of(backend, [(4, 2), (0, 2)])
        start = shard * shard_tokens
        end = first_new if is_last else start + shard_tokens
        # What earlier steps have computed.
        plan = backend.plan([QueryRange(0, end - start, 0, table)])
        q_before = torch.zeros(end - start, num_kv_heads, group, HEAD_DIM, dtype=dtype)
        backend.attend(plan, q_before, k_SKD[start:end], v_SKD[start:end], layer, scale)
        before = layer.k.clone()
        plan = backend.plan([QueryRange(0, num_rows, end - start, table, is_written=is_last)])
        parts.append(backend.attend_with_lse(plan, q_TKGD, k_SKD[first_new:], v_SKD[first_new:], layer, scale))
        assert is_last == (not torch.equal(layer.k.nan_to_num(), before.nan_to_num()))
    out_THD, lse_TH = merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    expected_THD, expected_TH = reference.attention(q_TKGD.flatten(1, 2), k_SKD, v_SKD, scale, is_causal=True)
    torch.testing.assert_close(out_THD.double(), expected_THD, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse_TH.double(), expected_TH, atol=TOLERANCE[dtype], rtol=0)


def test_a_batch_of_shards_some_written_here_and_some_elsewhere_is_each_of_them_alone(
    backend: AttentionBackend,
) -> None:
    torch.manual_seed(1)
    layer = backend.allocate(12, BLOCK_SIZE, 2, HEAD_DIM, torch.float32)
    for tensor in layer:
        tensor.normal_()
    ranges = [
        QueryRange(0, 3, 30, table_of(backend, [(0, 4)])),
        QueryRange(3, 4, 64, table_of(backend, [(4, 4)]), is_written=False),
        QueryRange(7, 1, 0, table_of(backend, [(8, 4)])),
        QueryRange(8, 2, 0, table_of(backend, [(8, 4)]), is_written=False),  # a shard without a key
    ]
    q_TKGD = torch.randn(10, 2, 3, HEAD_DIM)
    k_TKD, v_TKD = torch.randn(10, 2, HEAD_DIM), torch.randn(10, 2, HEAD_DIM)
    together = backend.attend_with_lse(backend.plan(ranges), q_TKGD, k_TKD, v_TKD, layer, 0.25)
    for found in ranges:
        rows = slice(found.first_row, found.first_row + found.num_rows)
        plan = backend.plan([found._replace(first_row=0)])
        alone = backend.attend_with_lse(plan, q_TKGD[rows], k_TKD[rows], v_TKD[rows], layer, 0.25)
        for both, single in zip(together, alone, strict=True):
            torch.testing.assert_close(both[rows], single, atol=1e-6, rtol=0)
    assert together[1][8:].isneginf().all() and not together[0][8:].any()
    with pytest.raises(AssertionError, match="another rank's shard"):
        backend.attend(backend.plan(ranges), q_TKGD, k_TKD, v_TKD, layer, 0.25)
