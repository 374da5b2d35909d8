"""DeepSeek V2 and V3, Kimi K2 and GLM-4.7 Flash: latent attention, experts beside shared ones, dense first layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from megatron_medha.core.model_spec import Experts, LatentAttention
from megatron_medha.models.families.expert_rows import (
    NORMED_WEIGHTS,
    dense_first_layers,
    predicting_layers,
    sigmoid_experts,
)
from megatron_medha.models.families.family import Family, Rule, TensorRow
from megatron_medha.models.families.glm4_moe import SIGMOID_EXPERT_READS, SIGMOID_EXPERT_ROWS
from megatron_medha.models.families.llama import (
    ATTENTION_BIAS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    MLP_BIAS,
    MLP_ROWS,
    NORM_ROWS,
    OUTPUT_ROWS,
)
from megatron_medha.models.hf_rope import rope_scaling
from megatron_medha.safe_files.json_fields import JsonFields

_THEIRS, _OURS = "model.layers.{layer}.self_attn", "decoder.layers.{layer}.self_attention"
_LATENT_EPSILON = 1e-6  # of the latent vectors' norms, whatever rms_norm_eps says
_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *NORM_ROWS,
    TensorRow(f"{_THEIRS}.q_proj.weight", f"{_OURS}.linear_q_proj.weight"),
    TensorRow(f"{_THEIRS}.q_a_proj.weight", f"{_OURS}.linear_q_down_proj.weight"),
    TensorRow(f"{_THEIRS}.q_a_layernorm.weight", f"{_OURS}.q_layernorm.weight"),
    TensorRow(f"{_THEIRS}.q_b_proj.weight", f"{_OURS}.linear_q_up_proj.weight"),
    TensorRow(f"{_THEIRS}.kv_a_proj_with_mqa.weight", f"{_OURS}.linear_kv_down_proj.weight"),
    TensorRow(f"{_THEIRS}.kv_a_layernorm.weight", f"{_OURS}.kv_layernorm.weight"),
    TensorRow(f"{_THEIRS}.kv_b_proj.weight", f"{_OURS}.linear_kv_up_proj.weight"),
    *OUTPUT_ROWS,
    *MLP_ROWS,
    *SIGMOID_EXPERT_ROWS,
)
# Of DeepSeek's own code; transformers passes over them.
_NOTES = "ep_size aux_loss_alpha seq_aux topk_method scoring_func moe_layer_freq"
_READS = f"{SIGMOID_EXPERT_READS} {_NOTES} kv_lora_rank q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim " + (
    "v_head_dim rope_interleave"
)
_RULES = {
    "attention_bias": ATTENTION_BIAS,
    "norm_topk_prob": NORMED_WEIGHTS,
    "topk_method": Rule((None, "noaux_tc"), "experts must be chosen by their scores and a bias"),
    "scoring_func": Rule((None, "sigmoid"), "experts must be scored by sigmoids"),
    "moe_layer_freq": Rule((None, 1), "every layer after the first dense ones must have experts"),
}


def _latent_traits(config: JsonFields) -> dict[str, Any]:
    latent = LatentAttention(
        q_rank=None if config.fields.get("q_lora_rank") is None else config.integer("q_lora_rank"),
        kv_rank=config.integer("kv_lora_rank"),
        nope_dim=config.integer("qk_nope_head_dim"),
        rope_dim=config.integer("qk_rope_head_dim"),
        value_dim=config.integer("v_head_dim"),
        norm_epsilon=_LATENT_EPSILON,
    )
    if latent.rope_dim % 2:
        raise config.wrong("qk_rope_head_dim", "even, for rotary positions")
    return {
        "latent": latent,
        "has_qk_norm": True,  # of the latent vectors
        "num_kv_heads": config.integer("num_attention_heads"),
        "head_dim": latent.nope_dim + latent.rope_dim,
        "is_rotary_interleaved": config.flag("rope_interleave", True),
        "softmax_scale": _softmax_scale(config, latent.nope_dim + latent.rope_dim),
    }


def _softmax_scale(config: JsonFields, head_dim: int) -> float | None:
    """Of scaled positions also the scores are scaled, by YaRN's temperature; None: they are not."""
    scaling = rope_scaling(config)
    if scaling.kind == "none" or not scaling.mscale_all_dim or scaling.factor <= 1:
        return None
    temperature = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0
    return float(temperature**2 * head_dim**-0.5)


def _v2_experts(config: JsonFields) -> Experts:
    groups: dict[str, Any] = {}
    if config.fields["topk_method"] == "group_limited_greedy":
        num_groups, best = config.integer("n_group"), config.integer("topk_group")
        if (num_experts := config.integer("n_routed_experts")) % num_groups:
            raise config.wrong("n_group", f"a divisor of n_routed_experts={num_experts}")
        if best > num_groups or config.integer("num_experts_per_tok") > best * (num_experts // num_groups):
            raise config.wrong("topk_group", f"at most n_group={num_groups}, of groups with enough experts")
        groups = {"num_groups": num_groups, "num_groups_per_token": best, "is_group_by_best": True}
    scale = config.number("routed_scaling_factor", 1.0)
    return Experts(
        num_experts=config.integer("n_routed_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        layers=dense_first_layers(config),
        is_scored_first=True,
        **groups,
        weight_scale=scale if scale != 1.0 else None,
        shared_ffn_hidden_size=config.integer("moe_intermediate_size") * config.integer("n_shared_experts"),
        router_dtype="fp32",
    )


def _glm_experts(config: JsonFields) -> Experts:
    """Layers by mlp_layer_types; without it the first is dense."""
    num_layers = config.integer("num_hidden_layers")
    kinds = config.fields.get("mlp_layer_types") or ["dense"] + ["sparse"] * (num_layers - 1)
    is_known = isinstance(kinds, list) and all(each in ("dense", "sparse") for each in kinds)
    if not is_known or len(kinds) != num_layers:
        raise config.wrong("mlp_layer_types", f"dense or sparse for each of num_hidden_layers={num_layers}")
    return replace(sigmoid_experts(config), layers=tuple(each == "sparse" for each in kinds))


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    defaults={
        "max_position_embeddings": 4096, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "num_nextn_predict_layers": 1, "head_dim": 64,
    },
    renamed={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    reads=_READS,
    rules=_RULES,
    traits=lambda config: {**_latent_traits(config), "experts": sigmoid_experts(config)},
    tensors=lambda _: _ROWS,
    unread_keys=predicting_layers,
)  # fmt: skip
KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2")  # its code is DeepSeek's
GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    defaults={
        "max_position_embeddings": 202752, "moe_intermediate_size": 1536,
        "n_shared_experts": 1, "n_routed_experts": 64, "routed_scaling_factor": 1.8, "kv_lora_rank": 512,
        "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 4, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "head_dim": 64,
    },
    renamed={"num_local_experts": "n_routed_experts"},
    reads=f"{_READS} mlp_layer_types",
    rules={**_RULES, "first_k_dense_replace": Rule((None, 1), "mlp_layer_types says which layers have experts")},
    traits=lambda config: {**_latent_traits(config), "experts": _glm_experts(config)},
    tensors=lambda _: _ROWS,
    unread_keys=predicting_layers,
)  # fmt: skip
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    defaults={
        "max_position_embeddings": 2048, "moe_intermediate_size": 1407, "n_shared_experts": 2, "n_routed_experts": 64,
        "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "first_k_dense_replace": 0, "topk_method": "greedy",
        "head_dim": 64,
    },
    renamed={"num_experts": "n_routed_experts"},
    reads=_READS,
    rules={
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": MLP_BIAS,
        "norm_topk_prob": Rule((None, False), "transformers does not norm the weights of a token's experts"),
        "topk_method": Rule(("greedy", "group_limited_greedy"), "experts are chosen among all or of the best groups"),
        "scoring_func": Rule((None, "softmax"), "experts must be scored by a softmax"),
        "moe_layer_freq": Rule((None, 1), "every layer after the first dense ones must have experts"),
    },
    traits=lambda config: {**_latent_traits(config), "experts": _v2_experts(config)},
    tensors=lambda _: _ROWS,
)  # fmt: skip
