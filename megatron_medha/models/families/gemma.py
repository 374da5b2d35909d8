"""Gemma 1: zero-centred norms, gated GELU, and embeddings times the root of the hidden size.

Embeddings stay as they are. All that is added to them is divided by that root when it is loaded, and the norms'
epsilon with it: in fp32 that is exact to rounding; bf16 weights are rounded once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_medha.models.families.family import Family, Rule, TensorRow
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS, scaled
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
