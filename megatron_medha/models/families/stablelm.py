"""StableLM 1.6B to 12B: a Llama with LayerNorm and partial rotary positions."""

from __future__ import annotations

from megatron_medha.models.families.family import Family, Rule
from megatron_medha.models.families.llama import LLAMA_ROWS

STABLELM = Family(
    model_type="stablelm",
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
    },
    renamed={"layer_norm_eps": "rms_norm_eps"},
    reads="use_qkv_bias use_parallel_residual qk_layernorm",
    reads_partial_rotary=True,
    rules={
        "use_parallel_residual": Rule((None, False), "attention must come before the MLP, not beside it"),
        "qk_layernorm": Rule((None, False), "queries and keys must not be normalised"),
    },
    traits=lambda config: {"has_layer_norms": True, "has_qkv_bias": config.flag("use_qkv_bias")},
    tensors=lambda _: LLAMA_ROWS,
)  # fmt: skip
