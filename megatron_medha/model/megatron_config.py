"""Megatron-core's TransformerConfig for a ModelSpec: every trait by Megatron's name, and nothing that needs CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_medha.core.errors import UnsupportedModelError
from megatron_medha.core.model_spec import Experts, LatentAttention, ModelSpec
from megatron_medha.parallel.groups import MedhaPGs


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Plain functions: Megatron's own of these go through torch.compile, for seconds at the first forward.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "squared_relu": _squared_relu,
    "relu": F.relu,
}
_SOFTMAX_TYPES = {"plain": "vanilla", "sinks": "learnable", "off-by-one": "off-by-one"}


def transformer_config(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    pgs: MedhaPGs,
    is_initialized: bool,
    precision: Mapping[str, Any],
) -> TransformerConfig:
    """Megatron's description of the model, for ranks of these groups. precision: fields of Transformer Engine's FP8.

    Positions are left out: rotary ones are computed in rotary.py, and the embedding gets learned ones by itself.
    Raises UnsupportedModelError for values that Megatron itself refuses.
    """
    fields: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        "layernorm_epsilon": spec.norm_epsilon,
        "normalization": "LayerNorm" if spec.has_layer_norms else "RMSNorm",
        "layernorm_zero_centered_gamma": spec.has_zero_centred_norms,
        "qk_layernorm": spec.has_qk_norm,
        "add_bias_linear": spec.has_linear_biases,
        "add_qkv_bias": spec.has_qkv_bias,
        "attention_output_gate": spec.has_output_gate,
        "softmax_scale": spec.softmax_scale,
        "softmax_type": _SOFTMAX_TYPES[spec.softmax],
        "gated_linear_unit": spec.has_gate,
        "activation_func": ACTIVATIONS[spec.activation],
        "activation_func_clamp_value": spec.activation_clamp,
        "glu_linear_offset": spec.gate_offset,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.02,
        "perform_initialization": is_initialized,
        "use_cpu_initialization": device.type == "cpu",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": pgs.tp.size(),
        "pipeline_model_parallel_size": pgs.pp.size(),
        # What follows fails, or compiles for seconds at the first forward, where there is no CUDA.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "memory_efficient_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "batch_p2p_sync": False,
    }
    if spec.experts is not None:
        fields |= _expert_fields(spec.experts)
    try:
        if spec.latent is None:
            return TransformerConfig(**fields, **precision)
        return MLATransformerConfig(**fields, **precision, **_latent_fields(spec.latent))
    except (AssertionError, ValueError) as error:  # its own checks of values against one another
        raise UnsupportedModelError(f"{spec.name}: megatron-core does not compute it: {error}") from error


def _expert_fields(experts: Experts) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(has) for has in experts.layers] or 1,  # 1 keeps the layers' tensors stacked
        "moe_router_score_function": experts.score,
        "moe_router_pre_softmax": experts.is_scored_first,
        "moe_router_enable_expert_bias": experts.has_choice_bias,
        "moe_router_num_groups": experts.num_groups,
        "moe_router_group_topk": experts.num_groups_per_token,
        "moe_router_topk_scaling_factor": experts.weight_scale,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.has_shared_gate,
        "moe_router_dtype": experts.router_dtype,
        # Training's: which tokens an expert drops must not depend on what else is in the batch.
        "moe_router_load_balancing_type": "none",
        "moe_expert_capacity_factor": None,
        "moe_input_jitter_eps": None,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        # Megatron refuses biases of experts that ranks share out; experts.py adds each of them once.
        "expert_tensor_parallel_size": 1,
    }


def _latent_fields(latent: LatentAttention) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.nope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",  # its tables are never looked at
    }
