"""SmolLM3: a Llama some of whose layers go without rotary positions."""

from __future__ import annotations

from typing import Any

from megatron_medha.models.families.family import Family, layers_of_type
from megatron_medha.models.families.llama import ATTENTION_BIAS, LLAMA_ROWS, MLP_BIAS
from megatron_medha.safe_files.json_fields import JsonFields


def _traits(config: JsonFields) -> dict[str, Any]:
    """no_rope_layers has 1 for a layer with rotary positions, and may be longer than the model."""
    num_layers = config.integer("num_hidden_layers")
    listed = config.fields.get("no_rope_layers")
    if listed is None:
        interval = config.integer("no_rope_layer_interval")
        listed = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or any(each not in (0, 1) for each in listed):
        raise config.wrong("no_rope_layers", f"a list with 0 or 1 for each of num_hidden_layers={num_layers}")
    without = tuple(not each for each in listed[:num_layers])
    return {"no_rope_layers": without if any(without) else ()}


def _windowed_layers(config: JsonFields) -> tuple[bool, ...]:
    """Those of layer_types; without it those that go without rotary positions. Only with use_sliding_window."""
    if found := layers_of_type(config, "sliding_attention"):
        return found
    without: tuple[bool, ...] = _traits(config)["no_rope_layers"]
    return without if config.flag("use_sliding_window") else ()


SMOLLM3 = Family(
    model_type="smollm3",
    defaults={
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000.0,
        "tie_word_embeddings": True, "no_rope_layer_interval": 4,
    },
    reads="no_rope_layers no_rope_layer_interval",
    rules={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    traits=_traits,
    tensors=lambda _: LLAMA_ROWS,
    windowed_layers=_windowed_layers,
)  # fmt: skip
