"""LoRA adapters of peft, merged into the weights of the Hugging Face checkpoint that they name, as these are loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_medha.checkpoints.checkpoint_format import CheckpointFormat, Progress
from megatron_medha.checkpoints.hf_checkpoint import (
    HUGGING_FACE,
    headers_of,
    load_hf_weights,
    read_hf_checkpoint_config,
)
from megatron_medha.checkpoints.quantised_tensors import Box, FloatTensor, Slices
from megatron_medha.checkpoints.weight_checks import StoredHeader
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import shown
from megatron_medha.safe_files.json_fields import JsonFields, read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"[\w.-]+")
_FACTOR = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
# What is read, and what is training's or says what the tensors show.
_KNOWN = frozenset(
    ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out")
    + ("task_type", "inference_mode", "lora_dropout", "init_lora_weights", "revision", "auto_mapping", "bias")
    + ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "peft_version")
    + ("modules_to_save", "loftq_config", "eva_config", "corda_config", "megatron_core", "runtime_config")
    + ("qalora_group_size", "ensure_weight_tying")
)


def read_lora_config(directory: Path, _: Path) -> ModelConfig:
    """The architecture of the base model. Raises what its own reading raises, and for a kind of adapter not merged."""
    _adapter_config(directory)
    return dataclasses.replace(read_hf_checkpoint_config(_base_of(directory)), name=directory.resolve().name)


def load_lora_weights(model: nn.Module, config: ModelConfig, directory: Path, progress: Progress) -> None:
    """Fill the model with the base model's weights, the adapter's products added in fp32."""
    adapter = headers_of([directory / WEIGHTS_NAME])
    settings = _adapter_config(directory)

    def merged(tensors: Mapping[str, FloatTensor]) -> dict[str, FloatTensor]:
        return dict(tensors) | _changed(tensors, adapter, settings)

    load_hf_weights(model, config, _base_of(directory), progress, merged, adapter)


def _adapter_config(directory: Path) -> JsonFields:
    config = read_json(directory / CONFIG_NAME)
    if config.fields.get("peft_type") != "LORA":
        raise config.unsupported("peft_type", "only LORA is merged")
    for key, value in config.fields.items():
        if value and key not in _KNOWN:
            raise config.unsupported(key, "this field of an adapter is not known here, and may change what it adds")
    if not (directory / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{directory / WEIGHTS_NAME}: missing, though there is {CONFIG_NAME}")
    return config


def _base_of(directory: Path) -> Path:
    """The directory of the base model."""
    config = read_json(directory / CONFIG_NAME)
    name = config.fields.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise config.wrong("base_model_name_or_path", "the directory of the base model")
    base = directory / name
    if not _is_directory(base) or HUGGING_FACE.find(base) is None:
        raise CheckpointError(
            f"{config.path}: base_model_name_or_path={shown(name)}: there is no Hugging Face checkpoint in {base}. "
            "Download the base model, and write its directory there"
        )
    return base


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of a name that is too long
        return False


def _changed(
    tensors: Mapping[str, FloatTensor], adapter: Mapping[str, StoredHeader], config: JsonFields
) -> dict[str, FloatTensor]:
    """The base model's tensors that the adapter adds to or replaces.

    Raises CheckpointError naming what does not belong to the base model or does not fit it.
    """
    found = {}
    for key, header in adapter.items():
        name = key.removeprefix(_PREFIX)
        if (match := _FACTOR.fullmatch(name)) is None:
            if name not in tensors:
                raise CheckpointError(f"{header.path}: tensor {key} is not part of the base model")
            found[name] = FloatTensor(header, _whole(key))  # a module that was trained and saved in full
        elif match[2] == "A":
            module, other = match[1], re.sub(r"\.lora_A\.", ".lora_B.", key)
            found[f"{module}.weight"] = _with_product(module, key, other, tensors, adapter, config)
        elif re.sub(r"\.lora_B\.", ".lora_A.", key) not in adapter:
            raise CheckpointError(f"{header.path}: tensor {key} has no lora_A beside it")
    return found


def _with_product(
    module: str,
    a_key: str,
    b_key: str,
    tensors: Mapping[str, FloatTensor],
    adapter: Mapping[str, StoredHeader],
    config: JsonFields,
) -> FloatTensor:
    path, weight = adapter[a_key].path, tensors.get(f"{module}.weight")
    if weight is None:
        raise CheckpointError(f"{path}: tensor {a_key}: the base model has no {module}.weight")
    if b_key not in adapter:
        raise CheckpointError(f"{path}: tensor {b_key} is missing")
    is_transposed = config.flag("fan_in_fan_out")
    a_shape, b_shape = adapter[a_key].shape, adapter[b_key].shape
    is_product = len(a_shape) == len(b_shape) == 2 and a_shape[0] == b_shape[1] > 0
    shape = (b_shape[0], a_shape[1]) if is_product else ()
    if weight.header.shape != (shape[::-1] if is_transposed else shape):
        raise CheckpointError(
            f"{path}: {a_key} of {list(adapter[a_key].shape)} and {b_key} of {list(adapter[b_key].shape)} do not fit "
            f"{module}.weight of {list(weight.header.shape)}"
        )
    rank = a_shape[0]
    scale = _alpha(config, module) / (sqrt(rank) if config.flag("use_rslora") else rank)

    def read(slices: Slices, box: Box) -> Tensor:
        inputs, outputs = box if is_transposed else box[::-1]
        product = slices(b_key)[outputs].float() @ slices(a_key)[:, inputs].float()
        found: Tensor = weight.read(slices, box).float() + scale * (product.t() if is_transposed else product)
        return found

    return FloatTensor(weight.header, read)


def _alpha(config: JsonFields, module: str) -> float:
    """lora_alpha, or that of the first pattern that the module's name ends in."""
    patterns = config.within("alpha_pattern")
    for name in patterns.fields:
        if not _NAME.fullmatch(name):  # of peft: a regular expression, which may take any time to match
            raise patterns.unsupported(name, "only the end of a module's name is")
        if f".{module}".endswith(f".{name}"):
            return patterns.number(name)
    return config.number("lora_alpha")


def _whole(key: str) -> Any:
    def read(slices: Slices, box: Box) -> Tensor:
        found: Tensor = slices(key)[box].to(torch.float32)
        return found

    return read


LORA = CheckpointFormat(
    f"a LoRA adapter of peft ({CONFIG_NAME} and {WEIGHTS_NAME})",
    lambda directory: directory if (directory / CONFIG_NAME).is_file() else None,
    read_lora_config,
    load_lora_weights,
)
