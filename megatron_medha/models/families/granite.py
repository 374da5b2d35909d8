"""Granite 3: a Llama with multipliers of embeddings, scores, residuals and logits.

Weights are multiplied when they are loaded. Embeddings are not: all that is added to them is divided instead, and the
norms' epsilon with it. In fp32 that is exact to rounding; bf16 weights are rounded once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_medha.models.families.family import Family, TensorRow
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS, MLP_BIAS, scaled
from megatron_medha.safe_files.json_fields import JsonFields


def _rows(config: JsonFields) -> Sequence[TensorRow]:
    head_dim = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    added = config.number("residual_multiplier") / config.number("embedding_multiplier")
    return scaled(
        LLAMA_ROWS,
        {
            "self_attention.linear_proj": added,
            "mlp.linear_fc2": added,
            "decoder.final_layernorm": 1 / config.number("logits_scaling"),
        },
        query_scale=config.number("attention_multiplier") * head_dim**0.5,
    )


def _traits(config: JsonFields) -> dict[str, Any]:
    return {"norm_epsilon": config.number("rms_norm_eps", 1e-6) / config.number("embedding_multiplier") ** 2}


GRANITE = Family(
    model_type="granite",
    defaults={
        "max_position_embeddings": 2048, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    },
    reads="embedding_multiplier logits_scaling residual_multiplier attention_multiplier",
    rules={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    traits=_traits,
    tensors=_rows,
)  # fmt: skip
