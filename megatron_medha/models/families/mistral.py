"""Mistral 7B, and Ministral 8B, whose layers may each have the window or not."""

from __future__ import annotations

from megatron_medha.models.families.family import Family, all_layers, layers_of_type
from megatron_medha.models.families.llama import LLAMA_ROWS
from megatron_medha.safe_files.json_fields import JsonFields

_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def _windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Without layer_types every layer has it."""
    return layers_of_type(config, "sliding_attention") or all_layers(config)


def _layers_of_mistral(config: JsonFields) -> tuple[bool, ...]:
    """Every layer. With other layer_types transformers has the window in none or in all, by how it is called."""
    if config.fields.get("sliding_window") is not None and not all(layers_of_type(config, "sliding_attention")):
        raise config.unsupported("layer_types", "with sliding_window every layer must have sliding_attention")
    return all_layers(config)


MISTRAL = Family(
    model_type="mistral",
    defaults=_DEFAULTS,
    tensors=lambda _: LLAMA_ROWS,
    windowed_layers=_layers_of_mistral,
)
MINISTRAL = Family(
    model_type="ministral", defaults=_DEFAULTS, tensors=lambda _: LLAMA_ROWS, windowed_layers=_windowed_layers
)
