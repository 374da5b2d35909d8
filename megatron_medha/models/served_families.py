"""Which families of Hugging Face models are served, with which traits, and which others are not, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_medha.models.families.family import Family
from megatron_medha.models.families.family_table import FAMILIES, NOT_SERVED
from megatron_medha.models.hf_config import config_of_family
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.json_fields import JsonFields

# Sizes that the defaults of every family divide.
_SIZES = {
    "vocab_size": 512, "hidden_size": 10240, "intermediate_size": 1024, "num_hidden_layers": 12,
    "num_attention_heads": 640,
}  # fmt: skip
_OF_EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 8, "num_experts": 8}
# Traits whose steps are not calls of the native library for many layers at once (model/cpu_model.py).
_SLOWER = (
    "sinks", "off-by-one", "attention output gate", "latent attention", "norms after", "norm of all heads",
    "two rotary bases", "capped", "scaled embeddings",
)  # fmt: skip


class ServedFamily(NamedTuple):
    """One model_type of config.json."""

    model_type: str
    is_served: bool
    layers: str              # whose compute it: Llama's (written for inference) or Megatron's; empty: not served
    is_native: bool          # a step on one CPU rank in bf16 is few calls of the native library
    traits: tuple[str, ...]  # beyond Llama's, of a model with the family's defaults
    missing: str = ""        # why it is not served


def served_families() -> Iterator[ServedFamily]:
    """Those served, by name; then others that are known."""
    for name, family in sorted(FAMILIES.items()):
        model = _with_defaults(family)
        is_fast = not any(trait.startswith(_SLOWER) for trait in model.traits)
        layers = "Llama's" if model.is_llama_like else "Megatron's"
        yield ServedFamily(name, True, layers, is_fast, model.traits)
    for name, missing in sorted(NOT_SERVED.items()):
        yield ServedFamily(name, False, "", False, (), missing)


def _with_defaults(family: Family) -> ModelConfig:
    """The model of a config.json that states sizes alone, and what the family must state to be served."""
    fields = {**family.defaults, **_SIZES}
    # A window is a trait where it cuts something.
    fields["max_position_embeddings"] = max(1 << 17, family.defaults.get("max_position_embeddings", 0))
    of_experts = {key: number for key, number in _OF_EXPERTS.items() if key in family.reads.split()}
    fields = of_experts | fields
    for key, rule in family.rules.items():
        if key in fields and fields[key] not in rule.values:
            fields[key] = rule.values[0]
    config = family.spelled(JsonFields(Path("config.json"), fields))
    return config_of_family(family, config, family.model_type, tuple)
