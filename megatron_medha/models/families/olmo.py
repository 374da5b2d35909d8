"""OLMo 2 and 3, whose norms are of the layers' outputs, and OLMoE; queries and keys are normed over all heads."""

from __future__ import annotations

from typing import Any

from megatron_medha.core.model_spec import Experts
from megatron_medha.models.families.expert_rows import EXPERT_READS, OURS, expert_rows
from megatron_medha.models.families.family import Family, Rule, TensorRow, layers_of_type
from megatron_medha.models.families.llama import (
    ATTENTION_BIAS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    LLAMA_ROWS,
    MLP_ROWS,
    OUTPUT_ROWS,
    QK_NORM_ROWS,
    qkv_rows,
    rows_of_weights_and_biases,
)
from megatron_medha.models.hf_rope import local_theta, rope_scaling, rope_theta, with_one_rope
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER, _OURS = "model.layers.{layer}", "decoder.layers.{layer}"
_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *rows_of_weights_and_biases("model.norm", "decoder.final_layernorm"),
    TensorRow(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.post_attention_layernorm.weight"),
    TensorRow(f"{_LAYER}.post_feedforward_layernorm.weight", f"{_OURS}.post_mlp_layernorm.weight"),
    *qkv_rows(),
    *OUTPUT_ROWS,
    *QK_NORM_ROWS,
    *MLP_ROWS,
)
_OLMOE_ROWS = (
    *LLAMA_ROWS,
    TensorRow(f"{_LAYER}.mlp.gate.weight", f"{OURS}.router.weight"),
    *expert_rows(f"{_LAYER}.mlp"),
)
_TRAITS = {"has_pre_norms": False, "has_post_norms": True, "has_qk_norm": True, "is_qk_norm_wide": True}
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def _olmo3_windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Those of layer_types; without it all but every fourth."""
    if found := layers_of_type(config, "sliding_attention"):
        return found
    return tuple((i + 1) % 4 != 0 for i in range(config.integer("num_hidden_layers")))


def _olmo3_traits(config: JsonFields) -> dict[str, Any]:
    """Positions of layers with a window are never scaled, whether or not the window cuts anything."""
    theta, local = rope_theta(config), local_theta(config)
    if rope_scaling(config).kind == "none" and theta == local:
        return _TRAITS
    return {**_TRAITS, "local_rope_theta": local, "local_rope_layers": _olmo3_windowed_layers(config)}


def _olmoe_traits(config: JsonFields) -> dict[str, Any]:
    experts = Experts(
        num_experts=config.integer("num_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("intermediate_size"),
        is_scored_first=not config.flag("norm_topk_prob"),
    )
    return {"has_qk_norm": True, "is_qk_norm_wide": True, "experts": experts}


OLMO2 = Family(
    model_type="olmo2",
    defaults=_DEFAULTS,
    rules={"attention_bias": ATTENTION_BIAS},
    traits=lambda _: _TRAITS,
    tensors=lambda _: _ROWS,
)
OLMO3 = Family(
    model_type="olmo3",
    # transformers takes rope_theta for layers without a window alone; there is no name for the other.
    spelled=lambda config: with_one_rope(config, 500_000.0, 500_000.0),
    reads="rope_local_base_freq",
    defaults={**_DEFAULTS, "sliding_window": 4096},
    rules={"attention_bias": ATTENTION_BIAS},
    traits=_olmo3_traits,
    tensors=lambda _: _ROWS,
    windowed_layers=_olmo3_windowed_layers,
)
OLMOE = Family(
    model_type="olmoe",
    defaults={
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64,
        "norm_topk_prob": False,
    },
    renamed={"num_local_experts": "num_experts"},
    reads=f"{EXPERT_READS} clip_qkv",
    rules={
        "attention_bias": ATTENTION_BIAS,
        "clip_qkv": Rule((None,), "queries, keys and values are not cut off here"),
    },
    traits=_olmoe_traits,
    tensors=lambda _: _OLMOE_ROWS,
)  # fmt: skip
