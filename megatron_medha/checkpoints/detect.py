"""Checkpoint directories of any kind: recognising which kind one is, its architecture and its weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from megatron_medha.checkpoints.checkpoint_format import CheckpointFormat, Progress
from megatron_medha.checkpoints.gguf_checkpoint import GGUF
from megatron_medha.checkpoints.hf_checkpoint import HUGGING_FACE
from megatron_medha.checkpoints.lora_adapter import LORA
from megatron_medha.checkpoints.megatron_checkpoint import MEGATRON
from megatron_medha.checkpoints.zero_checkpoint import ZERO
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import ModelConfig

FORMATS = (MEGATRON, HUGGING_FACE, LORA, ZERO, GGUF)


def find_checkpoint(directory: Path) -> tuple[CheckpointFormat, Path]:
    """The kind of checkpoint, and where its tensors are. CheckpointError lists what was looked for if none."""
    if not directory.is_dir():
        if (found := GGUF.find(directory)) is not None:
            return GGUF, found
        raise CheckpointError(f"{directory}: no such directory; checkpoint= must name one, or a GGUF file")
    for each in FORMATS:
        if (found := each.find(directory)) is not None:
            return each, found
    *others, last = (each.looked_for for each in FORMATS)
    raise CheckpointError(
        f"{directory}: no checkpoint found. Looked for {', for '.join(others)} and for {last}. "
        f"{_what_is_there(directory)}"
    )


def read_model_config(directory: Path | str) -> ModelConfig:
    """The architecture of the checkpoint in that directory.

    Raises CheckpointError when there is none or it is damaged, UnsupportedModelError with the reason when the
    model is none we can run.
    """
    directory = Path(directory)
    kind, found = find_checkpoint(directory)
    return kind.read_config(directory, found)


def load_weights(model: nn.Module, config: ModelConfig, directory: Path | str, progress: Progress) -> None:
    """Fill a model built from `config` with the checkpoint's weights, converted to its dtype and device.

    progress: told what is being read and the fraction read, 0 to 1. torch.distributed must be initialised for a
    Megatron checkpoint. Raises CheckpointError naming file and key for every tensor that is missing, surplus,
    of the wrong shape or unreadable.
    """
    kind, found = find_checkpoint(Path(directory))
    kind.load_weights(model, config, found, progress)


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
