"""StarCoder2, Nemotron 3 and 4, Arcee's AFM and Jais 2: decoders whose MLP has no gate."""

from __future__ import annotations

from typing import Any

from megatron_medha.models.families.family import ANY_ACTIVATION, Family, all_layers
from megatron_medha.models.families.llama import (
    ATTENTION_BIAS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    LLAMA_ROWS,
    MLP_BIAS,
    NORM_ROWS,
    OUTPUT_ROWS,
    qkv_rows,
    rows_of_weights_and_biases,
)
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER, _OURS = "model.layers.{layer}", "decoder.layers.{layer}"
_STARCODER2_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *NORM_ROWS,
    *qkv_rows(),
    *OUTPUT_ROWS,
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.c_fc", f"{_OURS}.mlp.linear_fc1"),
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.c_proj", f"{_OURS}.mlp.linear_fc2"),
)


def _jais2_traits(config: JsonFields) -> dict[str, Any]:
    has_biases = config.flag("attention_bias")
    if has_biases != config.flag("mlp_bias"):
        raise config.unsupported("mlp_bias", f"attention_bias={has_biases}; all linear layers have biases or none")
    return {"has_layer_norms": True, "has_gate": False, "has_linear_biases": has_biases}


STARCODER2 = Family(
    model_type="starcoder2",
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-5, "use_bias": True, "tie_word_embeddings": True,
    },
    renamed={"norm_epsilon": "rms_norm_eps"},
    reads="use_bias",
    rules={"hidden_act": ANY_ACTIVATION},
    traits=lambda config: {
        "has_layer_norms": True, "has_gate": False, "has_linear_biases": config.flag("use_bias"),
    },
    tensors=lambda _: _STARCODER2_ROWS,
    windowed_layers=all_layers,
)  # fmt: skip
NEMOTRON = Family(
    model_type="nemotron",
    defaults={
        "max_position_embeddings": 4096, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
    },
    renamed={"norm_eps": "rms_norm_eps"},
    reads_partial_rotary=True,
    rules={"hidden_act": ANY_ACTIVATION, "attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    traits=lambda _: {"has_layer_norms": True, "has_zero_centred_norms": True, "has_gate": False},
    tensors=lambda _: LLAMA_ROWS,
)  # fmt: skip
ARCEE = Family(
    model_type="arcee",
    defaults={"max_position_embeddings": 4096, "hidden_act": "relu2", "rms_norm_eps": 1e-5},
    rules={"hidden_act": ANY_ACTIVATION, "attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    traits=lambda _: {"has_gate": False},
    tensors=lambda _: LLAMA_ROWS,
)
JAIS2 = Family(
    model_type="jais2",
    defaults={
        "max_position_embeddings": 8192, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "attention_bias": True,
        "mlp_bias": True,
    },
    renamed={"layer_norm_eps": "rms_norm_eps"},
    rules={"hidden_act": ANY_ACTIVATION},
    traits=_jais2_traits,
    tensors=lambda _: LLAMA_ROWS,
)  # fmt: skip
