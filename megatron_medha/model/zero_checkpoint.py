"""Checkpoints of DeepSpeed's ZeRO engine, stages 1 to 3, read through DeepSpeed's own reader.

Layout: DIR/latest names DIR/global_step100, which holds *_model_states.pt and *_optim_states.pt, the latter with the
fp32 master weights in as many pieces as there were ranks. What was trained is a transformers model, whose config.json
lies in DIR, or a Megatron one, whose arguments are in the model states, as Megatron-DeepSpeed puts them there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from megatron_medha.core.errors import CheckpointError
from megatron_medha.model.hf_checkpoint import may_be_ignored, placements, share_of, zero_padding_rows
from megatron_medha.model.hf_config import read_hf_config
from megatron_medha.model.megatron_args import config_from_args
from megatron_medha.model.megatron_checkpoint import sharded_state_dict, tokenizer_facts
from megatron_medha.model.model_config import ModelConfig
from megatron_medha.model.safe_pickle import load_torch_file

LATEST_NAME = "latest"
_MODEL_STATES, _OPTIM_STATES = "*_model_states.pt", "*_optim_states.pt"
_MEGATRON_EMBEDDING = "embedding.word_embeddings.weight"
_MEGATRON_ROOTS = ("embedding.", "decoder.layers.", "decoder.final_layernorm.", "output_layer.")
_NORM_NAMES = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_MAX_PROBLEMS_SHOWN = 8


def find_zero_checkpoint(directory: Path) -> Path | None:
    """The directory of the step that DIR/latest names; None without that file. Raises CheckpointError if broken."""
    latest = directory / LATEST_NAME
    if not latest.is_file():
        return None
    tag = latest.read_text(errors="replace").strip()
    step = directory / tag
    if not tag or "/" in tag or not step.is_dir():
        raise CheckpointError(f"{step}: no such directory, though {latest} names {tag[:40]!r}")
    for pattern in (_MODEL_STATES, _OPTIM_STATES):
        if not list(step.glob(pattern)):
            raise CheckpointError(f"{step}: no {pattern}; not a ZeRO checkpoint, or an incomplete one")
    if others := sorted(path.name for path in step.glob("*mp_rank_*") if "mp_rank_00" not in path.name):
        raise CheckpointError(
            f"{step / others[0]}: trained with tensor or pipeline parallelism, which DeepSpeed's reader does not join; "
            "save it from Megatron as torch_dist"
        )
    return step


def read_zero_config(directory: Path) -> ModelConfig:
    """The architecture, from config.json or from the arguments that were saved with the model."""
    if (directory / "config.json").is_file():
        return read_hf_config(directory)
    step = _found(directory)
    path = sorted(step.glob(_MODEL_STATES))[0]
    states = load_torch_file(path, is_mapped=True)
    args = states.get("args") if isinstance(states, Mapping) else None
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(
            f"{path}: holds no 'args', and {directory} no config.json; the architecture is read from one of them"
        )
    shapes = {name: shape for group in states.get("param_shapes") or [] for name, shape in group.items()}
    if _MEGATRON_EMBEDDING not in shapes:
        raise CheckpointError(f"{path}: tensor {_MEGATRON_EMBEDDING} is missing")
    num_ids, stop_token_ids = tokenizer_facts((directory,))
    return config_from_args(
        args, path, name=directory.resolve().name, dtype="bfloat16" if getattr(args, "bf16", False) else "float32",
        num_embedding_rows=shapes[_MEGATRON_EMBEDDING][0], num_tokenizer_ids=num_ids, stop_token_ids=stop_token_ids,
    )  # fmt: skip


@torch.no_grad()
def load_zero_weights(
    model: Any, config: ModelConfig, directory: Path, progress: Callable[[str, float], None]
) -> None:
    """Fill this rank's part of the model with the master weights, converted to its dtype, one tensor at a time.

    Raises CheckpointError naming the step's directory or file and the key of every tensor that is missing, surplus,
    of the wrong shape or unreadable.
    """
    step = _found(directory)
    progress(f"weights from {step.name}", 0.0)
    tensors = _master_weights(directory, step)
    fill = _fill_from_megatron if _MEGATRON_EMBEDDING in tensors else _fill_from_transformers
    fill(model, config, tensors, step)
    progress(f"weights from {step.name}", 1.0)


def _found(directory: Path) -> Path:
    step = find_zero_checkpoint(directory)
    if step is None:
        raise CheckpointError(f"{directory}: no ZeRO checkpoint")
    return step


def _master_weights(directory: Path, step: Path) -> dict[str, Any]:
    """By name, tensors or what DeepSpeed puts together from the ranks' pieces when asked for it."""
    with _deepspeed_reader() as reader:
        try:
            found: dict[str, Any] = reader.get_fp32_state_dict_from_zero_checkpoint(
                str(directory), tag=step.name, lazy_mode=True
            )
        except CheckpointError:
            raise
        except Exception as error:  # a reader of files raises nearly anything on damaged ones
            raise CheckpointError(f"{step}: DeepSpeed's reader cannot put it together: {error!r}") from error
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


@contextlib.contextmanager
def _deepspeed_reader() -> Iterator[Any]:
    """DeepSpeed's module, made to unpickle by our rules and to keep quiet."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what reads files needs no other, and guessing prints a warning
    from deepspeed.utils import zero_to_fp32

    class Torch:
        """torch, whose load runs no code of the file's."""

        @staticmethod
        def load(file: Any, **_: Any) -> Any:
            return load_torch_file(Path(file), is_mapped=True)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    kept = zero_to_fp32.torch, zero_to_fp32.tqdm
    zero_to_fp32.torch, zero_to_fp32.tqdm = Torch(), lambda files, **_: files
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield zero_to_fp32
    finally:
        zero_to_fp32.torch, zero_to_fp32.tqdm = kept


def _fill_from_transformers(model: Any, config: ModelConfig, tensors: Mapping[str, Any], step: Path) -> None:
    parameters = dict(model.named_parameters())
    share = share_of(model)
    expected = placements(config, set(parameters), share)
    shapes = {key: placement.shape for key, placement in expected.items()}
    _check(shapes, {key: tensor for key, tensor in tensors.items() if not may_be_ignored(key, config)}, step)
    zero_padding_rows(parameters, config, share)
    for key, placement in expected.items():
        if placement.parameter is None:
            continue
        whole = _whole(tensors[key])
        if placement.split_dim is not None:
            rows = share.rows(placement.shape[placement.split_dim])
            whole = whole[rows] if placement.split_dim == 0 else whole[:, rows]
        destination = placement.view(parameters[placement.parameter])
        destination.copy_(whole.view(destination.shape) if whole.is_contiguous() else whole.reshape(destination.shape))


def _fill_from_megatron(model: Any, config: ModelConfig, tensors: Mapping[str, Any], step: Path) -> None:
    """Megatron's own description of this rank's tensors says which part of the whole ones they are."""
    for local, name in _NORM_NAMES.items():  # Megatron's description has Transformer Engine's names in any case
        tensors = {key.replace(local, name): tensor for key, tensor in tensors.items()}
    wanted = sharded_state_dict(model, {"non_homogeneous_layers": True})
    apply_factories(wanted)
    parts = list(nested_values(wanted))
    # What belongs to other stages is checked there.
    surplus = {key for key in tensors if not key.startswith(_MEGATRON_ROOTS)}
    _check({part.key: tuple(part.global_shape) for part in parts}, tensors, step, surplus=surplus,
           may_be_longer={part.key for part in parts if part.allow_shape_mismatch}, num_ids=config.vocab_size)
    for part in parts:
        whole = _whole(tensors[part.key])
        slices = tuple(
            slice(first, first + size) for first, size in zip(part.global_offset, part.local_shape, strict=True)
        )
        found = whole[slices]
        part.data[tuple(slice(0, size) for size in found.shape)].copy_(found)
        part.data[found.shape[0] :].zero_()  # rows that only fill up the vocabulary


def _check(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Any],
    step: Path,
    *,
    surplus: set[str] | None = None,
    may_be_longer: frozenset[str] | set[str] = frozenset(),
    num_ids: int = 0,
) -> None:
    """Raise one CheckpointError that names every (or the first few) tensor at fault.

    surplus: known to be too many; None: all that have no shape. may_be_longer: vocabularies, padded otherwise.
    """
    problems = [f"{step}: tensor {key} is missing" for key in shapes if key not in tensors]
    problems += [
        f"{step}: tensor {key} is not part of this model"
        for key in (set(tensors) - set(shapes) if surplus is None else surplus)
    ]
    for key, shape in shapes.items():
        found = tuple(tensors[key].shape) if key in tensors else shape
        is_padded = key in may_be_longer and found[1:] == shape[1:] and found[0] >= num_ids
        if found != shape and not is_padded:
            problems.append(f"{step}: tensor {key} has shape {list(found)}, the model's is {list(shape)}")
    if problems:
        num_hidden = len(problems) - _MAX_PROBLEMS_SHOWN
        more = [f"and {num_hidden} more"] if num_hidden > 0 else []
        raise CheckpointError("\n".join([*sorted(problems)[:_MAX_PROBLEMS_SHOWN], *more]))


def _whole(tensor: Any) -> Tensor:
    """All of a tensor that may still lie in pieces."""
    whole: Tensor = tensor.contiguous()
    return whole
