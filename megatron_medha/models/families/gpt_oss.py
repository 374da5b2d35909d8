"""gpt-oss: sinks, a window in every second layer, biases, and experts whose gates and ups are stored in turn."""

from __future__ import annotations

from typing import Any

from megatron_medha.core.model_spec import Experts
from megatron_medha.models.families.expert_rows import EXPERT_READS, OURS
from megatron_medha.models.families.family import Family, Rule, TensorRow, layers_of_type
from megatron_medha.models.families.llama import (
    EMBEDDING_ROWS,
    HEAD_ROWS,
    NORM_ROWS,
    OUTPUT_ROWS,
    qkv_rows,
    rows_of_weights_and_biases,
)
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER = "model.layers.{layer}"
_FC1, _FC2 = f"{OURS}.experts.linear_fc1", f"{OURS}.experts.linear_fc2"
_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *NORM_ROWS,
    *qkv_rows(),
    *OUTPUT_ROWS,
    TensorRow(f"{_LAYER}.self_attn.sinks", "decoder.layers.{layer}.self_attention.core_attention.softmax_offset"),
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.router", f"{OURS}.router"),
    TensorRow(f"{_LAYER}.mlp.experts.gate_up_proj", f"{_FC1}.weight", "paired_gate_up", is_transposed=True),
    TensorRow(f"{_LAYER}.mlp.experts.gate_up_proj_bias", f"{_FC1}.bias", "paired_gate_up"),
    TensorRow(f"{_LAYER}.mlp.experts.down_proj", f"{_FC2}.weight", is_transposed=True),
    TensorRow(f"{_LAYER}.mlp.experts.down_proj_bias", f"{_FC2}.bias"),
)


def _traits(config: JsonFields) -> dict[str, Any]:
    return {
        "softmax": "sinks",
        "has_linear_biases": True,
        "activation": "quick_gelu",  # times the sigmoid of 1.702 times itself
        "activation_clamp": config.number("swiglu_limit"),
        "gate_offset": 1.0,
        "experts": Experts(
            num_experts=config.integer("num_local_experts"),
            num_per_token=config.integer("num_experts_per_tok"),
            ffn_hidden_size=config.integer("intermediate_size"),
        ),
    }


def _windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Those of layer_types; without it every second one, the first too."""
    every_second = tuple(i % 2 == 0 for i in range(config.integer("num_hidden_layers")))
    return layers_of_type(config, "sliding_attention") or every_second


GPT_OSS = Family(
    model_type="gpt_oss",
    defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    # The last two say again what others do.
    reads=f"{EXPERT_READS} num_local_experts swiglu_alpha swiglu_limit experts_per_token initial_context_length",
    rules={
        "attention_bias": Rule((True,), "all linear layers have biases"),
        "swiglu_alpha": Rule((1.702,), "the activation must be the sigmoid of 1.702 times its input"),
    },
    traits=_traits,
    tensors=lambda _: _ROWS,
    windowed_layers=_windowed_layers,
)  # fmt: skip
