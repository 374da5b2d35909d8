"""ERNIE 4.5, Helium and GLM-4 9B and 32B: Llamas in which neighbouring numbers of a query or key turn together.

The rows of their projections are loaded in another order, queries and keys alike: their products do not change.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_medha.models.families.family import Family, Rule, TensorRow
from megatron_medha.models.families.llama import (
    EMBEDDING_ROWS,
    HEAD_ROWS,
    MLP_BIAS,
    NORM_ROWS,
    OUTPUT_ROWS,
    PAIRED_ROWS,
    qkv_rows,
)

_OURS = "decoder.layers.{layer}"
_GLM_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *NORM_ROWS,
    *qkv_rows(has_rotary_pairs=True),
    *OUTPUT_ROWS,
    TensorRow("model.layers.{layer}.mlp.gate_up_proj.weight", "decoder.layers.{layer}.mlp.linear_fc1.weight"),
    TensorRow("model.layers.{layer}.mlp.down_proj.weight", "decoder.layers.{layer}.mlp.linear_fc2.weight"),
)

_GLM4_ROWS = (
    *_GLM_ROWS,
    TensorRow("model.layers.{layer}.post_self_attn_layernorm.weight", f"{_OURS}.post_attention_layernorm.weight"),
    TensorRow("model.layers.{layer}.post_mlp_layernorm.weight", f"{_OURS}.post_mlp_layernorm.weight"),
)

ERNIE4_5 = Family(
    model_type="ernie4_5",
    defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    reads="use_bias",
    rules={"use_bias": Rule((None, False), "linear layers have no biases here")},
    tensors=lambda _: PAIRED_ROWS,
)  # fmt: skip
HELIUM = Family(
    model_type="helium",
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
    },
    rules={"mlp_bias": MLP_BIAS},
    traits=lambda config: {"has_qkv_bias": config.flag("attention_bias")},
    tensors=lambda _: PAIRED_ROWS,
)  # fmt: skip
GLM = Family(
    model_type="glm",
    defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5, "attention_bias": True,
    },
    reads_partial_rotary=True,
    traits=lambda config: {"has_qkv_bias": config.flag("attention_bias")},
    tensors=lambda _: _GLM_ROWS,
)  # fmt: skip
GLM4 = replace(
    GLM,
    model_type="glm4",
    traits=lambda config: {"has_qkv_bias": config.flag("attention_bias"), "has_post_norms": True},
    tensors=lambda _: _GLM4_ROWS,
)
