"""Checks of a checkpoint's weights: enough of them for the model that its config describes, and all of them numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import MAX_CONTEXT_LEN, ModelConfig

_MAX_SHOWN = 8
_MAX_LAYERS = 4096  # each takes time and memory, however small its tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum carries NaN and infinity along, and needs no mask of the tensor's size; it may overflow by itself. In the
    # tensor's own dtype it takes an eighth of the time.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def refuse_non_finite(path: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError, in one line, if there are names: of the tensors that hold NaN or infinity."""
    if not names:
        return
    shown = ", ".join(sorted(names)[:_MAX_SHOWN])
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    raise CheckpointError(
        f"{path}: {shown}{more}: NaN or infinity among the weights, which would be in every completion; "
        "the training has diverged or the file is damaged, so take an earlier checkpoint"
    )


def refuse_larger_model(config: ModelConfig, path: Path, num_stored: int) -> None:
    """Raise CheckpointError if the model is far larger than its weights, or its context than any, before it is built.

    path: of what describes the model. num_stored: elements of all tensors. Which tensors are missing, or of another
    shape, is found when they are loaded.
    """
    num_params = config.shape(bytes_per_element=1).num_params
    if num_params > 2 * num_stored or config.num_layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{path}: describes a model of {config.num_layers} layers and {num_params} parameters; "
            f"the checkpoint holds {num_stored}"
        )
    if config.max_context_len > MAX_CONTEXT_LEN:
        raise CheckpointError(
            f"{path}: describes a context of {config.max_context_len} tokens; at most {MAX_CONTEXT_LEN} are served"
        )
