"""What a Hugging Face family is: the fields of config.json that it reads, their meaning, the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_medha.safe_files.json_fields import JsonFields


class TensorRow(NamedTuple):
    """A tensor of a checkpoint, and the parameter of a Megatron model that it is or is a part of.

    Names hold {layer} and {expert} for numbers. Parameters are named as Megatron's own layers name them. A row whose
    parameter a model does not have does not count. Of several rows for one part the first that is stored is taken.
    """

    key: str
    parameter: str
    part: str = "all"            # or q, k, v, qkv of linear_qkv; gate, up, paired_gate_up of linear_fc1
    is_transposed: bool = False  # stored as [inputs, outputs]
    has_rotary_pairs: bool = False  # q and k: pairs that turn together are neighbours; here they are half a head apart
    scale: float = 1.0           # what its values are multiplied by


class Rule(NamedTuple):
    """The values of a field under which a model is served; any other is refused with the reason."""

    values: tuple[Any, ...]
    reason: str


# A config's hidden_act in the words of ModelSpec.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
ANY_ACTIVATION = Rule(tuple(ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)} is")

TensorTable = Callable[[JsonFields], Sequence[TensorRow]]
NO_LAYER_WINDOWED: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model_type of config.json. Whatever it does not say is Llama's."""

    model_type: str
    # What transformers takes for a field that config.json does not have; null is another matter. Sizes are left out:
    # no checkpoint means those of the class, and one without them is damaged.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reads: str = ""  # fields beyond those that every family reads, by name
    renamed: Mapping[str, str] = field(default_factory=dict)  # its name of a field: that of the others
    reads_partial_rotary: bool = False  # partial_rotary_factor, of the whole heads' numbers those that turn
    rules: Mapping[str, Rule] = field(default_factory=dict)
    traits: Callable[[JsonFields], Mapping[str, Any]] = lambda _: {}  # fields of ModelSpec
    tensors: TensorTable
    # Puts fields that it spells in its own way where the others have them.
    spelled: Callable[[JsonFields], JsonFields] = lambda config: config
    # Which layers have the field sliding_window; empty: none. has_windows: False where transformers passes over it.
    windowed_layers: Callable[[JsonFields], tuple[bool, ...]] = lambda _: NO_LAYER_WINDOWED
    has_windows: bool = True
    # A pattern of the names of tensors that are stored and not needed; empty: all are.
    unread_keys: Callable[[JsonFields], str] = lambda _: ""


def all_layers(config: JsonFields) -> tuple[bool, ...]:
    """A window in every layer."""
    return (True,) * config.integer("num_hidden_layers")


def layers_of_type(config: JsonFields, layer_type: str) -> tuple[bool, ...]:
    """Which layers config.json's layer_types gives that type; empty if it has no such list."""
    return tuple(each == layer_type for each in config.fields.get("layer_types") or ())
