"""Checkpoints of DeepSpeed's ZeRO engine, stages 1 to 3: finding them, their architecture, filling a model.

Layout: DIR/latest names DIR/global_step100, which holds *_model_states.pt and *_optim_states.pt, the latter with the
fp32 master weights in as many pieces as there were ranks. What was trained is a transformers model, whose config.json
lies in DIR, or a Megatron one, whose arguments are in the model states, as Megatron-DeepSpeed puts them there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_medha.checkpoints.checkpoint_format import CheckpointFormat, Progress
from megatron_medha.checkpoints.megatron_checkpoint import sharded_parts
from megatron_medha.checkpoints.placements import checked_placements, model_slice_of, zero_padding_rows
from megatron_medha.checkpoints.weight_checks import (
    StoredHeader,
    is_finite,
    refuse_larger_model,
    refuse_misfits,
    refuse_non_finite,
)
from megatron_medha.checkpoints.zero_states import (
    MODEL_STATES,
    OPTIM_STATES,
    Pieces,
    parameter_shapes,
    read_master_weights,
    read_model_states,
)
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.families.llama import LLAMA_ROWS
from megatron_medha.models.hf_config import hf_tensor_rows, read_hf_config
from megatron_medha.models.megatron_args import config_from_args
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.tokenizer_facts import tokenizer_facts
from megatron_medha.safe_files.checkpoint_files import path_inside, read_word

LATEST_NAME = "latest"
_MEGATRON_EMBEDDING = "embedding.word_embeddings.weight"
_MEGATRON_ROOTS = ("embedding.", "decoder.layers.", "decoder.final_layernorm.", "output_layer.")
_NORM_NAMES = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


def find_zero_checkpoint(directory: Path) -> Path | None:
    """The directory of the step that DIR/latest names; None without that file. Raises CheckpointError if broken."""
    latest = directory / LATEST_NAME
    if not latest.is_file():
        return None
    tag = read_word(latest)
    step = path_inside(directory, tag, LATEST_NAME)
    if not step.is_dir():
        raise CheckpointError(f"{step}: no such directory, though {latest} names {tag[:40]!r}")
    for pattern in (MODEL_STATES, OPTIM_STATES):
        if not list(step.glob(pattern)):
            raise CheckpointError(f"{step}: no {pattern}; not a ZeRO checkpoint, or an incomplete one")
    if others := sorted(path.name for path in step.glob("*mp_rank_*") if "mp_rank_00" not in path.name):
        raise CheckpointError(
            f"{step / others[0]}: trained with tensor or pipeline parallelism, which DeepSpeed's reader does not join; "
            "save it from Megatron as torch_dist"
        )
    return step


def read_zero_config(directory: Path, step: Path) -> ModelConfig:
    """The architecture, from config.json or from the arguments that were saved with the model."""
    states, path = read_model_states(step)
    shapes = parameter_shapes(states, path)
    num_stored = sum(prod(shape) for shape in shapes.values())
    if (directory / "config.json").is_file():
        config = read_hf_config(directory)
        refuse_larger_model(config, directory / "config.json", num_stored)
        return config
    args = states.get("args")
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(
            f"{path}: holds no 'args', and {directory} no config.json; the architecture is read from one of them"
        )
    if _MEGATRON_EMBEDDING not in shapes:
        raise CheckpointError(f"{path}: tensor {_MEGATRON_EMBEDDING} is missing")
    num_ids, stop_token_ids = tokenizer_facts(directory)
    dtype = "bfloat16" if getattr(args, "bf16", False) is True else "float32"
    config = config_from_args(
        args, path, name=directory.resolve().name, dtype=dtype,
        num_embedding_rows=shapes[_MEGATRON_EMBEDDING][0], num_tokenizer_ids=num_ids, stop_token_ids=stop_token_ids,
    )  # fmt: skip
    refuse_larger_model(config, path, num_stored)
    return config


@torch.no_grad()
def load_zero_weights(model: Any, config: ModelConfig, step: Path, progress: Progress) -> None:
    """Fill this rank's part of the model with the master weights, converted to its dtype, one tensor at a time.

    Raises CheckpointError naming the step's directory or file and the key of every tensor that is missing, surplus,
    of the wrong shape or unreadable.
    """
    progress(f"weights from {step.name}", 0.0)
    tensors = read_master_weights(step)
    fill = _fill_from_megatron if _MEGATRON_EMBEDDING in tensors else _fill_from_transformers
    fill(model, config, tensors, step)
    progress(f"weights from {step.name}", 1.0)


def _fill_from_transformers(model: Any, config: ModelConfig, tensors: Mapping[str, Pieces], step: Path) -> None:
    has_config = (step.parent / "config.json").is_file()
    rows = hf_tensor_rows(step.parent) if has_config else LLAMA_ROWS
    parts = sharded_parts(model, {"non_homogeneous_layers": True})
    expected = checked_placements(rows, parts, config, _headers(tensors, step), step, "the model's is")
    zero_padding_rows(dict(model.named_parameters()), config, model_slice_of(model))
    refuse_non_finite(
        step, [key for key, placement in expected.items() if not placement.fill(tensors[key].joined().__getitem__)]
    )


def _fill_from_megatron(model: Any, config: ModelConfig, tensors: Mapping[str, Pieces], step: Path) -> None:
    """Megatron's own description of this rank's tensors says which part of the whole ones they are."""
    for local, name in _NORM_NAMES.items():  # Megatron's description has Transformer Engine's names in any case
        tensors = {key.replace(local, name): tensor for key, tensor in tensors.items()}
    parts = sharded_parts(model, {"non_homogeneous_layers": True})
    refuse_misfits(
        {part.key: tuple(part.global_shape) for part in parts},
        _headers(tensors, step),
        step,
        "the model's is",
        is_ignored=lambda key: key.startswith(_MEGATRON_ROOTS),  # what belongs to other stages is checked there
        may_be_longer={part.key for part in parts if part.allow_shape_mismatch},
        num_ids=config.vocab_size,
    )
    for part in parts:
        whole = tensors[part.key].joined()
        slices = tuple(
            slice(first, first + size) for first, size in zip(part.global_offset, part.local_shape, strict=True)
        )
        found = whole[slices]
        part.data[tuple(slice(0, size) for size in found.shape)].copy_(found)
        part.data[found.shape[0] :].zero_()  # rows that only fill up the vocabulary
    refuse_non_finite(step, [part.key for part in parts if not is_finite(part.data)])


def _headers(tensors: Mapping[str, Pieces], step: Path) -> dict[str, StoredHeader]:
    return {key: StoredHeader(step, tuple(pieces.shape), "F32") for key, pieces in tensors.items()}


ZERO = CheckpointFormat(
    f"one of DeepSpeed's ZeRO ({LATEST_NAME}, which names a directory with {OPTIM_STATES})",
    find_zero_checkpoint,
    read_zero_config,
    load_zero_weights,
)
