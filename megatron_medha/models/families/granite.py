"""Granite 3, dense and with experts: a Llama with multipliers of embeddings, scores, residuals and logits.

Weights are multiplied when they are loaded. Embeddings are not: all that is added to them is divided instead, and the
norms' epsilon with it. In fp32 that is exact to rounding; bf16 weights are rounded once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_medha.core.model_spec import Experts
from megatron_medha.models.families.expert_rows import EXPERT_READS, OURS
from megatron_medha.models.families.family import Family, TensorRow
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS, MLP_BIAS, scaled
from megatron_medha.safe_files.json_fields import JsonFields

_MAX_MULTIPLIER = 1e6  # beyond, weights overflow or vanish
_LAYER = "model.layers.{layer}.block_sparse_moe"
_EXPERT_ROWS = (
    TensorRow(f"{_LAYER}.router.layer.weight", f"{OURS}.router.weight"),
    TensorRow(f"{_LAYER}.input_linear.weight", f"{OURS}.experts.linear_fc1.weight"),
    TensorRow(f"{_LAYER}.output_linear.weight", f"{OURS}.experts.linear_fc2.weight"),
)


def _multiplier(config: JsonFields, key: str) -> float:
    value = config.number(key)
    if not 1 / _MAX_MULTIPLIER <= value <= _MAX_MULTIPLIER:
        raise config.wrong(key, f"from {1 / _MAX_MULTIPLIER:g} to {_MAX_MULTIPLIER:g}")
    return value


def _rows(config: JsonFields) -> Sequence[TensorRow]:
    head_dim = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    added = _multiplier(config, "residual_multiplier") / _multiplier(config, "embedding_multiplier")
    return scaled(
        (*LLAMA_ROWS, *_EXPERT_ROWS),
        {
            "self_attention.linear_proj": added,
            "linear_fc2": added,
            "decoder.final_layernorm": 1 / _multiplier(config, "logits_scaling"),
        },
        query_scale=_multiplier(config, "attention_multiplier") * head_dim**0.5,
    )


def _traits(config: JsonFields) -> dict[str, Any]:
    return {"norm_epsilon": config.number("rms_norm_eps", 1e-6) / _multiplier(config, "embedding_multiplier") ** 2}


def _moe_traits(config: JsonFields) -> dict[str, Any]:
    experts = Experts(
        num_experts=config.integer("num_local_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("intermediate_size"),
    )
    return {**_traits(config), "experts": experts}


_DEFAULTS = {
    "max_position_embeddings": 2048, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}  # fmt: skip
_READS = "embedding_multiplier logits_scaling residual_multiplier attention_multiplier"
GRANITE = Family(
    model_type="granite",
    defaults=_DEFAULTS,
    reads=_READS,
    rules={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    traits=_traits,
    tensors=_rows,
)
GRANITE_MOE = Family(
    model_type="granitemoe",
    defaults=_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    reads=f"{_READS} {EXPERT_READS} num_local_experts",
    rules={"attention_bias": ATTENTION_BIAS},
    traits=_moe_traits,
    tensors=_rows,
)
