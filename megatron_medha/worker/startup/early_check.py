"""What the server finds wrong with a checkpoint before it listens, from its configuration alone and without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_medha.models.hf_config import read_hf_config

# Files that make a directory a checkpoint of another kind. Their readers need torch, and so wait for the ranks.
_OTHER_KINDS = (
    "latest_checkpointed_iteration.txt", "latest_train_state.pt", "metadata.json", "context", "latest",
    "adapter_config.json",
)  # fmt: skip


def check_checkpoint(directory: Path) -> None:
    """Raises CheckpointError where there is no checkpoint, UnsupportedModelError for a Hugging Face model with all
    reasons that it is refused for; what only the weights or a training script's arguments tell, the ranks find.
    """
    if any((directory / name).exists() for name in _OTHER_KINDS):
        return
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        check_config(directory)
        return
    from megatron_medha.checkpoints.detect import find_checkpoint

    find_checkpoint(directory)


def check_config(directory: Path) -> None:
    """Raises UnsupportedModelError for what config.json says the model is, if that is not served."""
    read_hf_config(directory)
