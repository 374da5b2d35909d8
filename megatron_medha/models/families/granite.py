"""Granite 3: a Llama with multipliers of embeddings, scores, residuals and logits.

Weights are multiplied when they are loaded: a layer's output by its own projection, scores by the queries'. In fp32
that is exact to rounding; bf16 weights are rounded once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_medha.models.families.family import Family, TensorRow
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS, MLP_BIAS
from megatron_medha.safe_files.json_fields import JsonFields


def _multipliers(config: JsonFields) -> dict[str, float]:
    """By the end of the name of the parameter, or by the part of it."""
    head_dim = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    residual = config.number("residual_multiplier")
    return {
        "word_embeddings.weight": config.number("embedding_multiplier"),
        "output_layer.weight": 1 / config.number("logits_scaling"),
        "linear_proj.weight": residual,
        "linear_fc2.weight": residual,
        "q": config.number("attention_multiplier") * head_dim**0.5,
    }


def _has_one_matrix(config: JsonFields) -> bool:
    """Whether embedding and head are the same after they are multiplied."""
    found = _multipliers(config)
    return config.flag("tie_word_embeddings") and found["word_embeddings.weight"] == found["output_layer.weight"]


def _rows(config: JsonFields) -> Sequence[TensorRow]:
    multipliers = _multipliers(config)
    rows = list(LLAMA_ROWS)
    if config.flag("tie_word_embeddings") and not _has_one_matrix(config):
        rows.insert(0, TensorRow("model.embed_tokens.weight", "output_layer.weight"))
    return [
        row._replace(scale=multipliers.get(row.part, multipliers.get(".".join(row.parameter.split(".")[-2:]), 1.0)))
        for row in rows
    ]


def _traits(config: JsonFields) -> dict[str, Any]:
    return {"has_tied_embeddings": _has_one_matrix(config)}


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
