"""model=DIR/config.json and model=ORG/NAME of the Hugging Face hub: a model's sizes where an option would stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from megatron_medha.cli.parts.hub_models import hub_name, local_file
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.model_shape import ModelShape

_CONFIG = "config.json"
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def with_sizes(words: Sequence[str]) -> list[str]:
    """The words, with such a model written as model.shape={...}. Raises what reading its config.json raises."""
    found: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key == "model" and equals and ("/" in value or value.endswith(".json")):
            found += ["model=auto", f"model.shape={_as_word(_shape_of(word, value))}"]
        else:
            found.append(word)
    return found


def shape_in(directory: Path) -> ModelShape:
    """The sizes in directory/config.json. Raises what reading it raises."""
    from megatron_medha.models.hf_config import read_hf_config

    config = read_hf_config(directory)
    return config.shape(_DTYPE_BYTES[config.dtype])


def set_fields(shape: ModelShape) -> dict[str, object]:
    """What is not as by default."""
    return {
        field.name: value for field in fields(ModelShape) if (value := getattr(shape, field.name)) != field.default
    }


def _shape_of(word: str, value: str) -> ModelShape:
    path = Path(value).expanduser()
    if (name := hub_name(path)) is not None:
        return replace(shape_in(local_file("model", name, _CONFIG).parent), name=name.partition("@")[0].split("/")[1])
    directory = path.parent if path.name == _CONFIG else path
    if not (directory / _CONFIG).is_file():
        raise ConfigError(f"{word}: no {_CONFIG} there; give an option of model=, a Hugging Face directory or ORG/NAME")
    return shape_in(directory)


def _as_word(shape: ModelShape) -> str:
    return f"{{{','.join(f'{name}:{json.dumps(value)}' for name, value in set_fields(shape).items())}}}"
