"""GPT-2 and models of its code: learned positions, LayerNorm, biases; weights are stored [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_medha.models.families.family import ANY_ACTIVATION, Family, Rule, TensorRow
from megatron_medha.models.families.llama import rows_of_weights_and_biases
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER, _OURS = "h.{layer}", "decoder.layers.{layer}"
_ROWS = (
    TensorRow("wte.weight", "embedding.word_embeddings.weight"),
    TensorRow("wpe.weight", "embedding.position_embeddings.weight"),
    *rows_of_weights_and_biases("ln_f", "decoder.final_layernorm"),
    *rows_of_weights_and_biases(f"{_LAYER}.ln_1", f"{_OURS}.input_layernorm"),
    *rows_of_weights_and_biases(f"{_LAYER}.ln_2", f"{_OURS}.pre_mlp_layernorm"),
    *rows_of_weights_and_biases(
        f"{_LAYER}.attn.c_attn", f"{_OURS}.self_attention.linear_qkv", "qkv", is_transposed=True
    ),
    *rows_of_weights_and_biases(f"{_LAYER}.attn.c_proj", f"{_OURS}.self_attention.linear_proj", is_transposed=True),
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.c_fc", f"{_OURS}.mlp.linear_fc1", is_transposed=True),
    *rows_of_weights_and_biases(f"{_LAYER}.mlp.c_proj", f"{_OURS}.mlp.linear_fc2", is_transposed=True),
)


def _rows(_: JsonFields) -> Sequence[TensorRow]:
    """Transformers saves them below "transformer.", OpenAI's own are not."""
    head = TensorRow("lm_head.weight", "output_layer.weight")
    return [head, *(row._replace(key=f"transformer.{row.key}") for row in _ROWS), *_ROWS]


GPT2 = Family(
    model_type="gpt2",
    defaults={"max_position_embeddings": 1024, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5,
              "tie_word_embeddings": True},
    renamed={
        "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers", "n_inner": "intermediate_size", "activation_function": "hidden_act",
        "layer_norm_epsilon": "rms_norm_eps",
    },
    reads="scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn",
    rules={
        "hidden_act": ANY_ACTIVATION,
        "scale_attn_weights": Rule((True,), "scores must be divided by the root of head_dim"),
        "scale_attn_by_inverse_layer_idx": Rule((None, False), "all layers must scale their scores alike"),
    },
    traits=lambda config: {
        "positions": "learned", "has_layer_norms": True, "has_linear_biases": True, "has_gate": False,
        "ffn_hidden_size": config.integer("intermediate_size", 4 * config.integer("hidden_size")),
    },
    tensors=_rows,
    unread_keys=lambda _: r".*\.attn\.(masked_)?bias",  # which tokens each one sees
)  # fmt: skip
