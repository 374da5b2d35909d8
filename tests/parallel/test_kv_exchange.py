"""What travels between kvp ranks, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_medha.parallel.kv_exchange import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_log_sum_exp_travel_in_one_tensor_without_losing_a_bit(dtype: torch.dtype) -> None:
    out_THD = torch.randn(5, 6, 16).to(dtype)
    lse_TH = torch.randn(6, 5).T * 1e-3 + 12.0  # not contiguous; more digits than bf16 has
    lse_TH[2, 3] = -torch.inf                   # an empty shard
    packed_THE = pack(out_THD, lse_TH)
    assert packed_THE.dtype == dtype and packed_THE.is_contiguous()
    out, lse = unpack(packed_THE, 16)
    assert torch.equal(out, out_THD) and torch.equal(lse, lse_TH)
