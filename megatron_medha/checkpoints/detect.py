"""Checkpoint directories of any kind: recognising which kind one is, its architecture and its weights."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path

from torch import nn

from megatron_medha.checkpoints.hf_checkpoint import hf_weight_files, load_hf_weights, num_stored_elements
from megatron_medha.checkpoints.megatron_checkpoint import (
    find_megatron_checkpoint,
    load_megatron_weights,
    read_megatron_config,
)
from megatron_medha.checkpoints.weight_checks import refuse_larger_model
from megatron_medha.checkpoints.zero_checkpoint import find_zero_checkpoint, load_zero_weights, read_zero_config
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.hf_config import read_hf_config
from megatron_medha.models.model_config import ModelConfig


class CheckpointKind(Enum):
    """The layouts that can be read."""

    MEGATRON = "Megatron torch_dist"
    HUGGING_FACE = "Hugging Face safetensors"
    ZERO = "DeepSpeed ZeRO"


def checkpoint_kind(directory: Path) -> CheckpointKind:
    """Which kind of checkpoint the directory holds. Raises CheckpointError, saying what was looked for, if none."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; checkpoint= must name one")
    if find_megatron_checkpoint(directory) is not None:
        return CheckpointKind.MEGATRON
    if (directory / "config.json").is_file() and hf_weight_files(directory):
        return CheckpointKind.HUGGING_FACE
    if find_zero_checkpoint(directory) is not None:
        return CheckpointKind.ZERO
    raise CheckpointError(
        f"{directory}: no checkpoint found. Looked for a Megatron torch_dist checkpoint (metadata.json and .metadata, "
        "here or in the iter_* directory that latest_checkpointed_iteration.txt names), for a Hugging Face checkpoint "
        "(config.json and *.safetensors) and for one of DeepSpeed's ZeRO (latest, which names a directory with "
        f"*_optim_states.pt). {_what_is_there(directory)}"
    )


def read_model_config(directory: Path | str) -> ModelConfig:
    """The architecture of the checkpoint in that directory.

    Raises CheckpointError when there is none or it is damaged, UnsupportedModelError with the reason when the
    model is none we can run.
    """
    directory = Path(directory)
    match checkpoint_kind(directory):
        case CheckpointKind.MEGATRON:
            return read_megatron_config(directory)
        case CheckpointKind.HUGGING_FACE:
            config = read_hf_config(directory)
            refuse_larger_model(config, directory / "config.json", num_stored_elements(directory))
            return config
        case CheckpointKind.ZERO:
            return read_zero_config(directory)


def load_weights(
    model: nn.Module, config: ModelConfig, directory: Path | str, progress: Callable[[str, float], None]
) -> None:
    """Fill a model built from `config` with the checkpoint's weights, converted to its dtype and device.

    progress: told what is being read and the fraction read, 0 to 1. torch.distributed must be initialised for a
    Megatron checkpoint. Raises CheckpointError naming file and key for every tensor that is missing, surplus,
    of the wrong shape or unreadable.
    """
    directory = Path(directory)
    match checkpoint_kind(directory):
        case CheckpointKind.MEGATRON:
            load_megatron_weights(model, config, directory, progress)
        case CheckpointKind.HUGGING_FACE:
            load_hf_weights(model, config, directory, progress)
        case CheckpointKind.ZERO:
            load_zero_weights(model, config, directory, progress)


def _what_is_there(directory: Path) -> str:
    """A hint from the files that are there."""
    if list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
        return "Pickled PyTorch weights (*.bin, *.pth) are not read: convert them to safetensors."
    if (directory / "config.json").is_file():
        return "There is a config.json but no *.safetensors."
    if list(directory.glob("*.safetensors")):
        return "There are *.safetensors but no config.json."
    names = sorted(path.name for path in directory.iterdir())[:8]
    return f"It holds: {', '.join(names)}." if names else "It is empty."
