"""`medha models`: which families of models are served, and which are not, and why not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from megatron_medha.core.errors import ConfigError

USAGE = """\
usage: medha models [--json]

Prints the families of Hugging Face models by their model_type, as config.json has it: those that are served, whose
layers compute them, whether a step on one CPU rank in bf16 takes one call of the native library for many layers, and
their traits beyond Llama's, for a model with the family's defaults. Then families that are not served, and what is
missing. A checkpoint of Megatron is served by its arguments, whatever its family (docs/models.md); `medha serve
--check DIR` says what one is.

  --json     the same as a JSON list

examples:
  medha models
  medha models --json
"""
_HEAD = ("model_type", "layers", "native", "traits")


def run(words: Sequence[str]) -> int:
    """Print the table."""
    if any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    if unknown := [word for word in words if word != "--json"]:
        raise ConfigError(f"{unknown[0]}: takes --json and no other argument")
    from megatron_medha.models.served_families import served_families

    families = list(served_families())
    if "--json" in words:
        json.dump([each._asdict() for each in families], sys.stdout, indent=1)
        print()
        return 0
    served = [each for each in families if each.is_served]
    width = max(len(each.model_type) for each in families)
    _line(width, *_HEAD)
    for each in served:
        _line(
            width, each.model_type, each.layers, "yes" if each.is_native else "no", ", ".join(each.traits)
        )
    print("\nnot served, because of")
    for each in families:
        if not each.is_served:
            print(f"{each.model_type:<{width}}  {each.missing}")
    return 0


def _line(width: int, model_type: str, layers: str, native: str, traits: str) -> None:
    print(f"{model_type:<{width}}  {layers:<11} {native:<7} {traits}".rstrip())
