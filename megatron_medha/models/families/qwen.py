"""Qwen 2 and 2.5 and Seed-OSS, with biases of queries, keys and values, and Qwen 3, with norms of queries and keys."""

from __future__ import annotations

from megatron_medha.models.families.family import NO_LAYER_WINDOWED, Family, Rule, layers_of_type
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS, MLP_BIAS
from megatron_medha.safe_files.json_fields import JsonFields

QWEN_DEFAULTS = {
    "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def qwen_windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Those of layer_types; without it those from max_window_layers on. Only with use_sliding_window."""
    is_used = config.flag("use_sliding_window")
    first = config.fields.get("max_window_layers")
    if not isinstance(first, int):
        raise config.wrong("max_window_layers", "a whole number")
    if found := layers_of_type(config, "sliding_attention"):
        if any(found) and not is_used:
            raise config.unsupported("layer_types", "sliding_attention needs use_sliding_window=true")
        return found
    return tuple(i >= first for i in range(config.integer("num_hidden_layers"))) if is_used else NO_LAYER_WINDOWED


QWEN2 = Family(
    model_type="qwen2",
    defaults=QWEN_DEFAULTS,
    traits=lambda _: {"has_qkv_bias": True},
    tensors=lambda _: LLAMA_ROWS,
    windowed_layers=qwen_windowed_layers,
)
QWEN3 = Family(
    model_type="qwen3",
    defaults=QWEN_DEFAULTS | {"head_dim": 128},
    rules={"attention_bias": ATTENTION_BIAS},
    traits=lambda _: {"has_qk_norm": True},
    tensors=lambda _: LLAMA_ROWS,
    windowed_layers=qwen_windowed_layers,
)
SEED_OSS = Family(
    model_type="seed_oss",
    defaults={
        "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
    },
    reads="attention_out_bias",
    rules={
        "attention_out_bias": Rule((None, False), "attention's output projection has no bias here"),
        "mlp_bias": MLP_BIAS,
    },
    traits=lambda config: {"has_qkv_bias": config.flag("attention_bias")},
    tensors=lambda _: LLAMA_ROWS,
)  # fmt: skip
