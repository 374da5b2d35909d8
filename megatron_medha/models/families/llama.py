"""Llama 2 and 3, and the names of tensors that most families share, each using some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_medha.models.families.family import Family, Rule, TensorRow, layers_of_type
from megatron_medha.safe_files.json_fields import JsonFields

ATTENTION_BIAS = Rule((None, False), "it puts a bias on the attention's output projection")
MLP_BIAS = Rule((None, False), "the MLP has no biases here")

_LAYER, _OURS = "model.layers.{layer}", "decoder.layers.{layer}"
_QKV, _FC1 = f"{_OURS}.self_attention.linear_qkv", f"{_OURS}.mlp.linear_fc1"


def rows_of_weights_and_biases(key: str, parameter: str, part: str = "all", **options: Any) -> tuple[TensorRow, ...]:
    """Both of a layer; a model without a bias has no such parameter."""
    return tuple(TensorRow(f"{key}.{kind}", f"{parameter}.{kind}", part, **options) for kind in ("weight", "bias"))


EMBEDDING_ROWS = (TensorRow("model.embed_tokens.weight", "embedding.word_embeddings.weight"),)
HEAD_ROWS = (TensorRow("lm_head.weight", "output_layer.weight"),)
NORM_ROWS = (
    *rows_of_weights_and_biases("model.norm", "decoder.final_layernorm"),
    *rows_of_weights_and_biases(f"{_LAYER}.input_layernorm", f"{_OURS}.input_layernorm"),
    *rows_of_weights_and_biases(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.pre_mlp_layernorm"),
)
OUTPUT_ROWS = rows_of_weights_and_biases(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.self_attention.linear_proj")
QK_NORM_ROWS = (
    TensorRow(f"{_LAYER}.self_attn.q_norm.weight", f"{_OURS}.self_attention.q_layernorm.weight"),
    TensorRow(f"{_LAYER}.self_attn.k_norm.weight", f"{_OURS}.self_attention.k_layernorm.weight"),
)
MLP_ROWS = (
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.gate_proj", _FC1, "gate"),
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.up_proj", _FC1, "up"),
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.down_proj", f"{_OURS}.mlp.linear_fc2"),
)


def qkv_rows(*, has_rotary_pairs: bool = False) -> tuple[TensorRow, ...]:
    """Projections to queries, keys and values."""
    return tuple(
        row
        for part in ("q", "k", "v")
        for row in rows_of_weights_and_biases(
            f"{_LAYER}.self_attn.{part}_proj", _QKV, part, has_rotary_pairs=has_rotary_pairs
        )
    )


LLAMA_ROWS = (*EMBEDDING_ROWS, *HEAD_ROWS, *NORM_ROWS, *qkv_rows(), *OUTPUT_ROWS, *QK_NORM_ROWS, *MLP_ROWS)
# Queries and keys whose neighbouring numbers turn together.
PAIRED_ROWS = (*EMBEDDING_ROWS, *HEAD_ROWS, *NORM_ROWS, *qkv_rows(has_rotary_pairs=True), *OUTPUT_ROWS, *MLP_ROWS)


def scaled(
    rows: Sequence[TensorRow], by_parameter: Mapping[str, float], query_scale: float = 1.0
) -> tuple[TensorRow, ...]:
    """The same rows, whose values are multiplied: by a part of the parameter's name; and those of the queries."""

    def scale(row: TensorRow) -> float:
        if row.part == "q":
            return query_scale
        return next((value for name, value in by_parameter.items() if name in row.parameter), 1.0)

    return tuple(row._replace(scale=scale(row)) for row in rows)


def _windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """A Llama has no window; one that asks for it was meant for other code."""
    is_meant = config.fields.get("use_sliding_window") is not False
    return (is_meant or any(layers_of_type(config, "sliding_attention")),)


LLAMA = Family(
    model_type="llama",
    defaults={"max_position_embeddings": 2048},
    rules={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    tensors=lambda _: LLAMA_ROWS,
    windowed_layers=_windowed_layers,
    has_windows=False,
)
