"""GLM-4.5, 4.6 and 4.7, and dots.llm1: experts chosen by sigmoids with a bias, a shared expert, dense first layers."""

from __future__ import annotations

from typing import Any

from megatron_medha.models.families.expert_rows import (
    EXPERT_READS,
    NORMED_WEIGHTS,
    OURS,
    expert_rows,
    predicting_layers,
    shared_expert_rows,
    sigmoid_experts,
)
from megatron_medha.models.families.family import Family, TensorRow, layers_of_type
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER = "model.layers.{layer}"
SIGMOID_EXPERT_ROWS = (
    TensorRow(f"{_LAYER}.mlp.gate.weight", f"{OURS}.router.weight"),
    TensorRow(f"{_LAYER}.mlp.gate.e_score_correction_bias", f"{OURS}.router.expert_bias"),
    *expert_rows(f"{_LAYER}.mlp"),
    *shared_expert_rows(f"{_LAYER}.mlp.shared_experts"),
)
SIGMOID_EXPERT_READS = f"{EXPERT_READS} n_routed_experts n_shared_experts routed_scaling_factor n_group topk_group " + (
    "first_k_dense_replace num_nextn_predict_layers"
)


def _glm_traits(config: JsonFields) -> dict[str, Any]:
    return {
        "has_qkv_bias": config.flag("attention_bias"),
        "has_qk_norm": config.flag("use_qk_norm"),
        "experts": sigmoid_experts(config),
    }


def _dots_windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Those of layer_types; without it those from max_window_layers on."""
    if found := layers_of_type(config, "sliding_attention"):
        return found
    first = config.fields.get("max_window_layers")
    if not isinstance(first, int):
        raise config.wrong("max_window_layers", "a whole number")
    return tuple(i >= first for i in range(config.integer("num_hidden_layers")))


GLM4_MOE = Family(
    model_type="glm4_moe",
    defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_routed_experts": 128, "first_k_dense_replace": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    },
    renamed={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    reads=f"{SIGMOID_EXPERT_READS} use_qk_norm",
    reads_partial_rotary=True,
    rules={"norm_topk_prob": NORMED_WEIGHTS},
    traits=_glm_traits,
    tensors=lambda _: (*LLAMA_ROWS, *SIGMOID_EXPERT_ROWS),
    unread_keys=predicting_layers,
)  # fmt: skip
DOTS1 = Family(
    model_type="dots1",
    defaults={
        "max_position_embeddings": 2048, "num_key_value_heads": 32, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "sliding_window": 4096, "max_window_layers": 62,
    },
    renamed={"num_local_experts": "n_routed_experts"},
    reads=SIGMOID_EXPERT_READS,
    rules={"norm_topk_prob": NORMED_WEIGHTS, "attention_bias": ATTENTION_BIAS},
    traits=lambda config: {"has_qk_norm": True, "experts": sigmoid_experts(config)},
    tensors=lambda _: (*LLAMA_ROWS, *SIGMOID_EXPERT_ROWS),
    windowed_layers=_dots_windowed_layers,
)  # fmt: skip
