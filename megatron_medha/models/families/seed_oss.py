"""Seed-OSS: a Llama with biases of queries, keys and values."""

from __future__ import annotations

from megatron_medha.models.families.family import Family, Rule
from megatron_medha.models.families.llama import LLAMA_ROWS, MLP_BIAS

SEED_OSS = Family(
    model_type="seed_oss",
    defaults={
        "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
    },
    reads="attention_out_bias",
    rules={
        "attention_out_bias": Rule((None, False), "attention's output projection has no bias here"),
        "mlp_bias": MLP_BIAS,
    },
    traits=lambda config: {"has_qkv_bias": config.flag("attention_bias")},
    tensors=lambda _: LLAMA_ROWS,
)  # fmt: skip
