"""Gemma 1 to 3: zero-centred norms, gated GELU, and embeddings times the root of the hidden size.

Gemma 1's embeddings stay as they are. All that is added to them is divided by that root when it is loaded, and the
norms' epsilon with it: in fp32 that is exact to rounding; bf16 weights are rounded once more.
Gemma 2 and 3 have norms of the layers' outputs too, and their embeddings are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    scaled,
)
from megatron_medha.models.hf_rope import local_theta, with_one_rope
from megatron_medha.safe_files.json_fields import JsonFields


def _rows(config: JsonFields) -> Sequence[TensorRow]:
    added = config.integer("hidden_size") ** -0.5
    return scaled(LLAMA_ROWS, {"self_attention.linear_proj": added, "mlp.linear_fc2": added})


def _traits(config: JsonFields) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",  # transformers takes "gelu" for it too
        "has_zero_centred_norms": True,
        "norm_epsilon": config.number("rms_norm_eps", 1e-6) / config.integer("hidden_size"),
    }


GEMMA = Family(
    model_type="gemma",
    defaults={
        "max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
    reads="use_bidirectional_attention hidden_activation",
    rules={
        "hidden_act": Rule(("gelu_pytorch_tanh", "gelu"), "the MLP must be gated GELU"),
        "hidden_activation": Rule((None, "gelu_pytorch_tanh"), "the MLP must be gated GELU"),
        "use_bidirectional_attention": Rule((None, False), "every token must see only those before it"),
        "attention_bias": ATTENTION_BIAS,
    },
    traits=_traits,
    tensors=_rows,
)  # fmt: skip

_LAYER, _OURS = "model.layers.{layer}", "decoder.layers.{layer}"
_SANDWICH_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    TensorRow("model.norm.weight", "decoder.final_layernorm.weight"),
    TensorRow(f"{_LAYER}.input_layernorm.weight", f"{_OURS}.input_layernorm.weight"),
    TensorRow(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.post_attention_layernorm.weight"),
    TensorRow(f"{_LAYER}.pre_feedforward_layernorm.weight", f"{_OURS}.pre_mlp_layernorm.weight"),
    TensorRow(f"{_LAYER}.post_feedforward_layernorm.weight", f"{_OURS}.post_mlp_layernorm.weight"),
    *qkv_rows(),
    *OUTPUT_ROWS,
    *QK_NORM_ROWS,
    *MLP_ROWS,
)
_MAX_CAP = 1e6  # beyond, tanh changes nothing, and products overflow
_READS = "use_bidirectional_attention hidden_activation query_pre_attn_scalar final_logit_softcapping " + (
    "attn_logit_softcapping"
)
_RULES = {
    # transformers looks at hidden_activation alone.
    "hidden_act": Rule(("gelu_pytorch_tanh", "gelu"), "the MLP must be gated GELU"),
    "hidden_activation": Rule(("gelu_pytorch_tanh",), "the MLP must be gated GELU"),
    "use_bidirectional_attention": Rule((None, False), "every token must see only those before it"),
    "attention_bias": ATTENTION_BIAS,
}
_DEFAULTS = {
    "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip


def _cap(config: JsonFields, key: str) -> float | None:
    if config.fields.get(key) is None:
        return None
    value = config.number(key)
    if not 1 / _MAX_CAP <= value <= _MAX_CAP:
        raise config.wrong(key, f"from {1 / _MAX_CAP:g} to {_MAX_CAP:g}")
    return value


def _sandwich_traits(config: JsonFields) -> dict[str, Any]:
    scale = config.number("query_pre_attn_scalar") ** -0.5
    return {
        "activation": "gelu_tanh",
        "has_zero_centred_norms": True,
        "has_post_norms": True,
        "embedding_scale": config.integer("hidden_size") ** 0.5,
        "softmax_scale": None if scale == config.integer("head_dim") ** -0.5 else scale,
        "logit_cap": _cap(config, "final_logit_softcapping"),
    }


def _every(config: JsonFields, pattern: int) -> tuple[bool, ...]:
    """Layers with a window by layer_types; without it all but every so many."""
    if found := layers_of_type(config, "sliding_attention"):
        return found
    return tuple((i + 1) % pattern != 0 for i in range(config.integer("num_hidden_layers")))


def _gemma3_windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    return _every(config, config.integer("sliding_window_pattern"))


def _gemma3_traits(config: JsonFields) -> dict[str, Any]:
    local = {"local_rope_theta": local_theta(config), "local_rope_layers": _gemma3_windowed_layers(config)}
    return {**_sandwich_traits(config), "has_qk_norm": True, **local}


GEMMA2 = Family(
    model_type="gemma2",
    defaults={
        **_DEFAULTS, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    },
    reads=_READS,
    rules=_RULES,
    traits=lambda config: {**_sandwich_traits(config), "score_cap": _cap(config, "attn_logit_softcapping")},
    tensors=lambda _: _SANDWICH_ROWS,
    windowed_layers=lambda config: _every(config, 2),
)  # fmt: skip
GEMMA3 = Family(
    model_type="gemma3_text",
    defaults={**_DEFAULTS, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
    reads=f"{_READS} rope_local_base_freq sliding_window_pattern",
    rules={**_RULES, "attn_logit_softcapping": Rule((None,), "transformers passes over it here")},
    spelled=lambda config: with_one_rope(config, 1_000_000.0, 10_000.0),
    traits=_gemma3_traits,
    tensors=lambda _: _SANDWICH_ROWS,
    windowed_layers=_gemma3_windowed_layers,
)
