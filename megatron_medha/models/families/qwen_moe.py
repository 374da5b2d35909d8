"""Qwen 1.5 and 2 MoE, with a shared expert behind a gate, and Qwen 3 MoE."""

from __future__ import annotations

from typing import Any

from megatron_medha.core.model_spec import Experts
from megatron_medha.models.families.expert_rows import EXPERT_READS, OURS, expert_rows, shared_expert_rows
from megatron_medha.models.families.family import NO_LAYER_WINDOWED, Family, TensorRow, all_layers, layers_of_type
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER = "model.layers.{layer}"
_ROWS = (
    *LLAMA_ROWS,
    TensorRow(f"{_LAYER}.mlp.gate.weight", f"{OURS}.router.weight"),
    *expert_rows(f"{_LAYER}.mlp"),
    *shared_expert_rows(f"{_LAYER}.mlp.shared_expert"),
    TensorRow(f"{_LAYER}.mlp.shared_expert_gate.weight", f"{OURS}.shared_experts.gate_weight"),
)
_READS = f"{EXPERT_READS} decoder_sparse_step mlp_only_layers"


def _experts(config: JsonFields, **more: Any) -> Experts:
    num_layers, every = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step")
    dense = config.fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(each, int) for each in dense):
        raise config.wrong("mlp_only_layers", "a list of numbers of layers")
    layers = tuple(i not in dense and (i + 1) % every == 0 for i in range(num_layers))
    if not any(layers):
        raise config.unsupported("decoder_sparse_step", f"no layer of {num_layers} would have experts")
    return Experts(
        num_experts=config.integer("num_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        layers=() if all(layers) else layers,
        is_scored_first=not config.flag("norm_topk_prob"),
        **more,
    )


def _qwen2_traits(config: JsonFields) -> dict[str, Any]:
    shared = {"shared_ffn_hidden_size": config.integer("shared_expert_intermediate_size"), "has_shared_gate": True}
    return {"has_qkv_bias": config.flag("qkv_bias"), "experts": _experts(config, **shared)}


def _qwen2_windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Those of layer_types; without it every second one before max_window_layers. Only with use_sliding_window."""
    if not config.flag("use_sliding_window"):
        return NO_LAYER_WINDOWED
    return layers_of_type(config, "sliding_attention") or all_layers(config)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    defaults={
        "max_position_embeddings": 32768, "num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28,
        "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False, "qkv_bias": True,
    },
    reads=f"{_READS} shared_expert_intermediate_size qkv_bias",
    traits=_qwen2_traits,
    tensors=lambda _: _ROWS,
    windowed_layers=_qwen2_windowed_layers,
)  # fmt: skip
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    defaults={
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096, "decoder_sparse_step": 1,
        "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False,
    },
    renamed={"num_local_experts": "num_experts"},
    reads=_READS,
    rules={"attention_bias": ATTENTION_BIAS},
    traits=lambda config: {"has_qk_norm": True, "experts": _experts(config)},
    tensors=lambda _: _ROWS,
    windowed_layers=lambda config: all_layers(config) if config.flag("use_sliding_window") else NO_LAYER_WINDOWED,
)  # fmt: skip
