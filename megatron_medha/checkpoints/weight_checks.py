"""Checks of a checkpoint's weights: those that the model is made of, enough for its config, and all of them numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import MAX_CONTEXT_LEN, ModelConfig
from megatron_medha.safe_files.checkpoint_files import listed

_MAX_SHOWN = 8
_MAX_LAYERS = 4096  # each takes time and memory, however small its tensors
_FLOATS = ("F64", "F32", "BF16", "F16", "torch.float32", "torch.bfloat16", "torch.float16")


class StoredHeader(NamedTuple):
    """What a file says of a tensor in it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors or torch name it


def refuse_misfits(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredHeader],
    where: Path,
    source: str,
    *,
    is_ignored: Callable[[str], bool] = lambda key: False,
    may_be_longer: Collection[str] = (),
    num_ids: int = 0,
) -> None:
    """Raise one CheckpointError that names every (or the first few) tensor that is missing, surplus or does not fit.

    expected: shapes by key; where: what should hold them; source: who says so. may_be_longer: vocabularies, which the
    layout that a model was trained in pads: `num_ids` rows suffice.
    """
    problems = [f"{where}: tensor {key} is missing" for key in expected if key not in stored]
    for key, (path, shape, dtype) in sorted(stored.items()):
        wanted = expected.get(key)
        if wanted is None:
            if not is_ignored(key):
                problems.append(f"{path}: tensor {key} is not part of this model")
            continue
        is_padded = key in may_be_longer and shape[1:] == wanted[1:] and shape[0] >= num_ids
        if shape != wanted and not is_padded:
            problems.append(f"{path}: tensor {key} has shape {list(shape)}, {source} {list(wanted)}")
        elif dtype not in _FLOATS:
            problems.append(f"{path}: tensor {key} has dtype {dtype}; weights must be floats")
    if problems:
        raise CheckpointError(listed(problems))


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
