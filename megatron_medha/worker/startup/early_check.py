"""What the server finds wrong with a checkpoint before it listens, from its configuration alone and without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_medha.models.hf_config import read_hf_config

# Files that make a directory a checkpoint of another kind. Their readers need torch, which the server does not import.
_OTHER_KINDS = (
    "latest_checkpointed_iteration.txt", "latest_train_state.pt", "metadata.json", "context", "latest",
    "adapter_config.json",
)  # fmt: skip


def check_checkpoint(directory: Path) -> None:
    """Raises CheckpointError where there is no checkpoint, UnsupportedModelError for a Hugging Face model with all
    reasons that it is refused for; of the other kinds nothing (needs_torch()).
    """
    if any((directory / name).exists() for name in _OTHER_KINDS) or any(directory.glob("*.gguf")):
        return
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        check_config(directory)
        return
    from megatron_medha.checkpoints.detect import find_checkpoint

    find_checkpoint(directory)


def needs_torch(checkpoint: Path) -> bool:
    """Whether check_checkpoint() cannot read what the model is."""
    return (
        any((checkpoint / name).exists() for name in _OTHER_KINDS)
        or not (checkpoint / "config.json").is_file()
        or not any(checkpoint.glob("*.safetensors"))
    )


def check_config(directory: Path) -> None:
    """Raises UnsupportedModelError for what config.json says the model is, if that is not served."""
    read_hf_config(directory)
