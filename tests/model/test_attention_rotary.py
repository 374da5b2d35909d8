"""Rotary angles and rotation against transformers, for every kind of scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: E402

from megatron_medha.core.model_spec import RopeScaling  # noqa: E402
from megatron_medha.model.rotary import Rotary, rotate  # noqa: E402
from megatron_medha.models.model_config import ModelConfig  # noqa: E402

HEAD_DIM = 64

# Ours, and what transformers calls it.
SCALINGS: dict[str, tuple[RopeScaling, dict[str, Any]]] = {
    "none": (RopeScaling(), {"rope_type": "default"}),
    "linear": (RopeScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScaling(
            kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context_len=512
        ),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "yarn": (
        RopeScaling(kind="yarn", factor=4.0, original_max_context_len=1024),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    ),
    "yarn with mscale": (
        RopeScaling(kind="yarn", factor=40.0, original_max_context_len=512, mscale=0.707, mscale_all_dim=1.0),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
    ),
    "yarn with its own range and amplitude": (
        RopeScaling(
            kind="yarn",
            factor=2.0,
            original_max_context_len=2048,
            beta_fast=16.0,
            beta_slow=2.0,
            attention_factor=1.25,
        ),
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
    ),
    "dynamic": (RopeScaling(kind="dynamic", factor=2.0), {"rope_type": "dynamic", "factor": 2.0}),
}


def ours(scaling: RopeScaling, *, theta: float = 10000.0, max_context_len: int = 2048) -> Rotary:
    return Rotary(
        ModelConfig(
            name="rotary",
            num_layers=1,
            hidden_size=256,
            ffn_hidden_size=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=HEAD_DIM,
            vocab_size=16,
            max_context_len=max_context_len,
            norm_epsilon=1e-5,
            rope_theta=theta,
            rope_scaling=scaling,
        )
    )


def theirs(parameters: dict[str, Any], *, theta: float = 10000.0, max_context_len: int = 2048) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD_DIM,
            max_position_embeddings=max_context_len,
            rope_parameters={"rope_theta": theta, **parameters},
        )
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_transformers_to_fp32_rounding(name: str, theta: float) -> None:
    scaling, parameters = SCALINGS[name]
    positions_T = torch.arange(2048)
    rotation = ours(scaling, theta=theta).at(positions_T)
    cos, sin = theirs(parameters, theta=theta)(torch.zeros(1), positions_T[None])
    # Scaled frequencies may differ in the last bit, which position 2048 enlarges to at most 1.2e-4 of a radian.
    tolerance = 2e-6 if name in ("none", "dynamic") else 2.5e-4
    assert (rotation.cos_TD - cos[0]).abs().max() < tolerance
    assert (rotation.signed_sin_TD[:, HEAD_DIM // 2 :] - sin[0][:, HEAD_DIM // 2 :]).abs().max() < tolerance
    assert torch.equal(rotation.signed_sin_TD[:, : HEAD_DIM // 2], -rotation.signed_sin_TD[:, HEAD_DIM // 2 :])


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_transformers_to_the_last_bit_or_so(name: str) -> None:
    scaling, parameters = SCALINGS[name]
    rotary, reference = ours(scaling), theirs(parameters)
    assert torch.allclose(rotary._frequencies_F.float(), reference.inv_freq, rtol=3e-7, atol=0)
    assert rotary._amplitude == pytest.approx(reference.attention_scaling, rel=1e-12)


def test_rotation_pairs_dimensions_as_transformers_does() -> None:
    torch.manual_seed(0)
    q_THD, k_TKD = torch.randn(20, 4, HEAD_DIM), torch.randn(20, 2, HEAD_DIM)
    positions_T = torch.randint(0, 2000, (20,))
    rotation = ours(RopeScaling()).at(positions_T)
    cos, sin = theirs({"rope_type": "default"})(q_THD, positions_T[None])
    expected_q, expected_k = apply_rotary_pos_emb(
        q_THD.transpose(0, 1)[None], k_TKD.transpose(0, 1)[None], cos, sin
    )
    assert torch.allclose(rotate(q_THD, rotation), expected_q[0].transpose(0, 1), rtol=0, atol=2e-6)
    assert torch.allclose(rotate(k_TKD, rotation), expected_k[0].transpose(0, 1), rtol=0, atol=2e-6)


def test_rotation_keeps_the_dtype_and_computes_in_fp32() -> None:
    x_THD = torch.randn(5, 3, HEAD_DIM).bfloat16()
    rotation = ours(RopeScaling()).at(torch.arange(5) * 100)
    turned = rotate(x_THD, rotation)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x_THD.float(), rotation).bfloat16())


def test_angles_that_are_looked_up_are_those_that_are_computed() -> None:
    rotary = ours(RopeScaling())
    positions_T = torch.tensor([0, 1, 777, 8191])
    beside_a_later_one = rotary.at(torch.cat((positions_T, torch.tensor([8192]))))
    for looked_up, computed in zip(rotary.at(positions_T)[:2], beside_a_later_one[:2], strict=True):
        assert torch.equal(looked_up, computed[:4])


@pytest.mark.parametrize("position", [131_072, 1_000_003, 9_999_999])
def test_angles_stay_exact_at_long_positions(position: int) -> None:
    rotary = ours(RopeScaling())
    rotation = rotary.at(torch.tensor([position]))
    expected = torch.cos(position * rotary._frequencies_F)
    assert (rotation.cos_TD[0, : HEAD_DIM // 2].double() - expected).abs().max() < 1e-7


def test_dynamic_scaling_of_a_long_prompt_is_transformers_whole_forward_whatever_the_chunks() -> None:
    scaling, parameters = SCALINGS["dynamic"]
    length = 3000  # beyond the model's own 2048
    positions_T = torch.arange(length)
    cos, _ = theirs(parameters)(torch.zeros(1), positions_T[None])
    rotary = ours(scaling)
    lengths_T = torch.full((length,), length)
    pieces = [rotary.at(positions_T[a:b], lengths_T[a:b]).cos_TD for a, b in ((0, 700), (700, 2999), (2999, 3000))]
    assert (torch.cat(pieces) - cos[0]).abs().max() < 2.5e-4


def test_dynamic_scaling_of_decoded_tokens_follows_the_length_as_transformers_does() -> None:
    scaling, parameters = SCALINGS["dynamic"]
    reference, rotary = theirs(parameters), ours(scaling)
    reference(torch.zeros(1), torch.arange(2500)[None])
    for position in (2500, 2501):
        cos, _ = reference(torch.zeros(1), torch.tensor([[position]]))
        ours_cos = rotary.at(torch.tensor([position]), torch.tensor([position + 1])).cos_TD
        assert (ours_cos - cos[0]).abs().max() < 2.5e-4


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="longrope"):
        ours(RopeScaling(kind="longrope"))
