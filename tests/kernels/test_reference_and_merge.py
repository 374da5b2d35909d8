"""The plain attention against a brute-force definition, and merging against the plain merge."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.merge import merge_outputs, merge_states


def test_plain_attention_is_the_definition_of_attention() -> None:
    torch.manual_seed(0)
    q_THD, k_SKD, v_SKD = torch.randn(3, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    out_THD, lse_TH = reference.attention(q_THD, k_SKD, v_SKD, 0.3, is_causal=True)
    for t in range(3):
        for h in range(4):
            keys = range(5 - 3 + t + 1)
            scores = [0.3 * float(q_THD[t, h].double() @ k_SKD[s, h // 2].double()) for s in keys]
            total = sum(math.exp(score) for score in scores)
            expected = sum(math.exp(score) / total * v_SKD[s, h // 2].double() for s, score in zip(keys, scores))
            assert torch.allclose(out_THD[t, h], expected, rtol=0, atol=1e-12)
            assert lse_TH[t, h].item() == pytest.approx(math.log(total), abs=1e-12)


def test_plain_attention_over_no_keys_is_zero_with_lse_minus_infinity() -> None:
    out_THD, lse_TH = reference.attention(
        torch.randn(2, 4, 8), torch.empty(0, 2, 8), torch.empty(0, 2, 8), 1.0, is_causal=False
    )
    assert torch.equal(out_THD, torch.zeros(2, 4, 8, dtype=torch.float64))
    assert lse_TH.isneginf().all()


@pytest.mark.parametrize("cuts", [[7], [1, 12], [0, 5, 5, 11], [3, 4, 5, 6, 7, 8]])
def test_merging_shards_gives_attention_over_their_union(cuts: list[int]) -> None:
    torch.manual_seed(1)
    q_THD, k_SKD, v_SKD = torch.randn(4, 6, 16), torch.randn(13, 3, 16), torch.randn(13, 3, 16)
    bounds = [0, *cuts, 13]
    parts = [
        reference.attention(q_THD, k_SKD[a:b], v_SKD[a:b], 0.25, is_causal=False)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    out_RTHD, lse_RTH = (torch.stack(part).float() for part in zip(*parts, strict=True))
    expected_THD, expected_lse_TH = reference.attention(q_THD, k_SKD, v_SKD, 0.25, is_causal=False)
    for merge in (merge_states, reference.merge_states):
        out_THD, lse_TH = merge(out_RTHD, lse_RTH)
        assert torch.allclose(out_THD.double(), expected_THD, rtol=0, atol=2e-6)  # fp32 inputs
        assert torch.allclose(lse_TH.double(), expected_lse_TH, rtol=0, atol=2e-6)


def test_an_empty_shard_has_no_weight_even_when_its_output_is_garbage() -> None:
    out_RTHD = torch.randn(3, 2, 4, 8)
    lse_RTH = torch.randn(3, 2, 4)
    lse_RTH[1] = -torch.inf
    alone_THD, alone_lse_TH = merge_states(out_RTHD[[0, 2]], lse_RTH[[0, 2]])
    out_RTHD[1] = torch.nan
    out_THD, lse_TH = merge_states(out_RTHD, lse_RTH)
    assert torch.equal(out_THD, alone_THD)
    assert torch.equal(lse_TH, alone_lse_TH)


def test_merging_only_empty_shards_is_zero_and_minus_infinity_never_nan() -> None:
    out_THD, lse_TH = merge_states(torch.full((2, 3, 4, 8), torch.nan), torch.full((2, 3, 4), -torch.inf))
    assert torch.equal(out_THD, torch.zeros(3, 4, 8))
    assert lse_TH.isneginf().all()


def test_merging_keeps_the_dtype_and_survives_large_scores() -> None:
    out_RTHD = torch.randn(2, 3, 4, 8).bfloat16()
    lse_RTH = torch.stack((torch.full((3, 4), 3e4), torch.full((3, 4), -3e4)))
    out_THD, lse_TH = merge_states(out_RTHD, lse_RTH)
    assert out_THD.dtype == torch.bfloat16
    assert torch.equal(out_THD, out_RTHD[0])
    assert torch.equal(lse_TH, lse_RTH[0])


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_merging_a_list_agrees_with_merging_a_stack(num_parts: int) -> None:
    parts = [(torch.randn(3, 4, 8), torch.randn(3, 4)) for _ in range(num_parts)]
    expected_THD, _ = merge_states(*(torch.stack(part) for part in zip(*parts, strict=True)))
    assert torch.allclose(merge_outputs(parts), expected_THD, rtol=0, atol=1e-6)


def test_merging_refuses_shapes_that_disagree() -> None:
    with pytest.raises(ValueError, match="disagree"):
        merge_states(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5))
