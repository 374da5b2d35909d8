"""Phi-3 and Phi-4: Llamas whose projections are stored fused."""

from __future__ import annotations

from typing import Any

from megatron_medha.models.families.family import Family, TensorRow, all_layers
from megatron_medha.models.families.llama import EMBEDDING_ROWS, HEAD_ROWS, NORM_ROWS, OUTPUT_ROWS
from megatron_medha.models.hf_rope import rope_scaling
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER, _OURS = "model.layers.{layer}", "decoder.layers.{layer}"
_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *NORM_ROWS,
    TensorRow(f"{_LAYER}.self_attn.qkv_proj.weight", f"{_OURS}.self_attention.linear_qkv.weight", "qkv"),
    *OUTPUT_ROWS,
    TensorRow(f"{_LAYER}.mlp.gate_up_proj.weight", f"{_OURS}.mlp.linear_fc1.weight"),
    TensorRow(f"{_LAYER}.mlp.down_proj.weight", f"{_OURS}.mlp.linear_fc2.weight"),
)


def _traits(config: JsonFields) -> dict[str, Any]:
    if rope_scaling(config).kind != "none":
        key = "rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters"
        raise config.unsupported(key, "rope_type must be default for a phi3")  # transformers takes yarn for longrope
    return {}


PHI3 = Family(
    model_type="phi3",
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    reads_partial_rotary=True,
    traits=_traits,
    tensors=lambda _: _ROWS,
    windowed_layers=all_layers,
)
