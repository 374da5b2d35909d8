"""Megatron torch_dist checkpoints, as Megatron-LM writes them: finding, reading and saving. Their args are elsewhere.

Layout: DIR/latest_checkpointed_iteration.txt names DIR/iter_0000100 (or DIR/release), which holds metadata.json,
.metadata (an index of tensors), *.distcp (their data) and common.pt (the training script's arguments).
Tensor names have no prefix there; NeMo puts "module." before them, some scripts "model.". All are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import queue
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_medha.checkpoints.checkpoint_format import CheckpointFormat, Progress
from megatron_medha.checkpoints.placements import FUSED_NORMS, model_slice_of, zero_padding_rows
from megatron_medha.checkpoints.weight_checks import (
    StoredHeader,
    is_finite,
    refuse_larger_model,
    refuse_misfits,
    refuse_non_finite,
)
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.models.bridge_config import (
    NEMO_CONFIG,
    RUN_CONFIG_NAME,
    SECTIONS,
    MissingFieldsError,
    fields_of,
    read_run_config,
)
from megatron_medha.models.hf_config import read_hf_config
from megatron_medha.models.megatron_args import args_from_config, config_from_args
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.tokenizer_facts import tokenizer_facts
from megatron_medha.parallel.cpu_shim import allow_megatron_without_cuda
from megatron_medha.safe_files.checkpoint_files import read_word, shown
from megatron_medha.safe_files.json_fields import read_json
from megatron_medha.safe_files.safe_pickle import load_torch_file
from megatron_medha.safe_files.stored_tensors import INDEX_NAME, StoredTensor, TensorFiles, read_index

TRACKER_NAME = "latest_checkpointed_iteration.txt"
BRIDGE_STATE_NAME = "latest_train_state.pt"
_PREFIXES = ("", "module.", "model.")
_EMBEDDING = "embedding.word_embeddings.weight"
# Roots of a language model's tensor names; what else a checkpoint holds (optimizer, random state) is training's.
_MODEL_ROOTS = ("embedding.", "decoder.", "output_layer.", "encoder.", "lm_head.")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def find_megatron_checkpoint(directory: Path) -> Path | None:
    """The directory that holds the tensors: the given one, or the iteration its tracker file names; None if neither.

    Raises CheckpointError when it is a Megatron checkpoint but not one that can be read.
    """
    if _sharded_backend(directory) is not None:
        return _checked(directory)
    if (directory / NEMO_CONFIG).is_file() and (directory / "weights").is_dir():
        return _checked(directory / "weights")
    tracker = directory / TRACKER_NAME
    if not tracker.is_file():
        return _checked(directory / _step_of_bridge(directory)) if (directory / BRIDGE_STATE_NAME).is_file() else None
    stated = read_word(tracker)
    if stated != "release" and not (stated.isdecimal() and len(stated) < 20):
        raise CheckpointError(f"{tracker}: holds {stated[:40]!r}, not a number of iterations or 'release'")
    iteration = directory / (stated if stated == "release" else f"iter_{int(stated):07d}")
    if not iteration.is_dir():
        raise CheckpointError(f"{iteration}: no such directory, though {TRACKER_NAME} names it")
    return _checked(iteration)


def read_megatron_config(directory: Path, iteration: Path) -> ModelConfig:
    """The architecture, from the arguments in common.pt and the shapes in .metadata."""
    tensors = _tensors(iteration)
    embedding = tensors.get(_EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"{iteration / INDEX_NAME}: tensor {_EMBEDDING} is missing")
    dtype = embedding.dtype
    if dtype not in _DTYPES:
        raise UnsupportedModelError(f"{iteration / INDEX_NAME}: {_EMBEDDING} has dtype {dtype}")
    home = directory.resolve() if iteration != directory else directory.resolve().parent
    try:
        args, path = _arguments(iteration)
    except MissingFieldsError as error:
        return _config_beside((directory, home, iteration), error, embedding, tensors)
    num_ids, stop_token_ids = tokenizer_facts(directory)
    try:
        config = config_from_args(
            args,
            path,
            name=home.name,
            dtype=_DTYPES[dtype],
            num_embedding_rows=embedding.shape[0],
            num_tokenizer_ids=num_ids,
            stop_token_ids=stop_token_ids,
        )
    except CheckpointError as error:
        if path.name not in SECTIONS:
            raise
        section = SECTIONS[path.name]
        message = str(error).replace(": args.", f": {section}.").replace("from 'args'", f"from {section!r}")
        raise type(error)(message) from None
    refuse_larger_model(config, path, sum(prod(tensor.shape) for tensor in tensors.values()))
    return config


def _config_beside(
    directories: Sequence[Path], error: MissingFieldsError, embedding: StoredTensor, tensors: Mapping[str, StoredTensor]
) -> ModelConfig:
    """The architecture in the config.json of the same model, if there is one that agrees with what is stated."""
    home = next((directory for directory in directories if (directory / "config.json").is_file()), None)
    if home is None:
        raise error
    path = home / "config.json"
    config = dataclasses.replace(read_hf_config(home), name=directories[1].name, dtype=_DTYPES[embedding.dtype])
    for name, value in fields_of(config).items():
        if error.stated.get(name) not in (None, value):
            raise CheckpointError(f"{path}: says {name}={value}, {RUN_CONFIG_NAME} says {shown(error.stated[name])}")
    refuse_larger_model(config, path, sum(prod(tensor.shape) for tensor in tensors.values()))
    return config


def _arguments(iteration: Path) -> tuple[argparse.Namespace, Path]:
    """The arguments that the model was trained with, and the file that holds them: Megatron-LM's, or Bridge's."""
    path = iteration / "common.pt"
    common = load_torch_file(path)
    args = common.get("args") if isinstance(common, Mapping) else None
    if isinstance(args, argparse.Namespace):
        return args, path
    if (iteration / RUN_CONFIG_NAME).is_file():
        return read_run_config(iteration / RUN_CONFIG_NAME), iteration / RUN_CONFIG_NAME
    if (beside := iteration.parent / NEMO_CONFIG).is_file():
        return read_run_config(beside), beside
    raise MissingFieldsError(
        f"{path}: holds no 'args', from which the architecture is read, and there is neither Megatron-Bridge's "
        f"{RUN_CONFIG_NAME} beside it nor the config.json of the same model",
        {},
    )


@torch.no_grad()
def load_megatron_weights(model: Any, config: ModelConfig, iteration: Path, progress: Progress) -> None:
    """Fill the model from the checkpoint, resharded to its own layout, straight into its parameters.

    Raises CheckpointError naming file and key when a tensor is missing, surplus, of the wrong shape or cut off.
    """
    allow_megatron_without_cuda()
    progress(f"weights from {iteration.name}", 0.0)
    tensors = _tensors(iteration)
    parts = sharded_parts(model, _layout_of(tensors))
    for part in parts:
        part.key = _stored_name(part.key, tensors)
    known_keys = _keys_of_all_stages(model, parts)
    index = iteration / ".metadata"
    refuse_misfits(
        {part.key: tuple(part.global_shape) for part in parts},
        {key: StoredHeader(index, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()},
        index,
        "args in common.pt say",
        is_ignored=lambda key: key in known_keys or key.endswith("._extra_state"),
        may_be_longer={part.key for part in parts if part.allow_shape_mismatch},
        num_ids=config.vocab_size,
    )
    files = TensorFiles()
    for part in parts:
        # A stack of layers has an axis more in the checkpoint than a layer's parameter has.
        files.fill(part.data[(None,) * part.prepend_axis_num], part.global_offset, tensors[part.key])
    zero_padding_rows(dict(model.named_parameters()), config, model_slice_of(model))
    refuse_non_finite(iteration, [part.key for part in parts if not is_finite(part.data)])
    progress(f"weights from {iteration.name}", 1.0)


def save_megatron_checkpoint(model: Any, config: ModelConfig, directory: Path, iteration: int) -> Path:
    """Write the model as Megatron-LM would; returns the iteration's directory.

    torch.distributed must be initialised. The tracker file is written last, so an interrupted save is never found.
    """
    allow_megatron_without_cuda()
    target = directory / f"iter_{iteration:07d}"
    target.mkdir(parents=True, exist_ok=True)
    args = args_from_config(config, next(model.parameters()).dtype)
    args.iteration = iteration
    # Left to itself megatron-core starts a queue server in a spawned process: three seconds, and the main module
    # runs again. The queue carries results between two functions of this very process.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(
        {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": sharded_state_dict(model, {}),
        },
        str(target),
    )
    (directory / TRACKER_NAME).write_text(str(iteration))
    return target


def _step_of_bridge(directory: Path) -> str:
    """The directory of the iteration that the first versions of Megatron-Bridge named in a file of their own only."""
    path = directory / BRIDGE_STATE_NAME
    state = load_torch_file(path)
    step = state.get("step") if isinstance(state, Mapping) else None
    if not isinstance(step, torch.Tensor) or step.numel() != 1:
        raise CheckpointError(f"{path}: holds no 'step', which names the iteration's directory")
    return f"iter_{int(step):07d}"


def _sharded_backend(directory: Path) -> str | None:
    path = directory / "metadata.json"
    if not path.is_file():
        return None
    backend = read_json(path).fields.get("sharded_backend")
    return None if backend is None else str(backend)


def _checked(iteration: Path) -> Path:
    backend = _sharded_backend(iteration)
    if backend is None:
        legacy = list(iteration.glob("mp_rank_*"))
        hint = " It looks like one in Megatron's older 'torch' format." if legacy else ""
        raise CheckpointError(
            f"{iteration}: metadata.json with a sharded_backend is missing.{hint} "
            "Convert it in Megatron-LM: --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
        )
    if backend != "torch_dist":
        raise CheckpointError(
            f"{iteration / 'metadata.json'}: sharded_backend={shown(backend)} cannot be read, torch_dist can. "
            "Convert it in Megatron-LM: --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
        )
    for name in (".metadata", "common.pt"):
        if not (iteration / name).is_file():
            raise CheckpointError(f"{iteration / name}: missing; the checkpoint is incomplete")
    return iteration


def _tensors(iteration: Path) -> dict[str, StoredTensor]:
    """The model's tensors in .metadata by their name without prefix; their data is checked to be there."""
    everything = read_index(iteration, [prefix + root for prefix in _PREFIXES for root in _MODEL_ROOTS])
    prefix = next((prefix for prefix in _PREFIXES if prefix + _EMBEDDING in everything), "")
    return {
        key.removeprefix(prefix): stored
        for key, stored in everything.items()
        if key.startswith(tuple(prefix + root for root in _MODEL_ROOTS))
    }


def _stored_name(key: str, tensors: Mapping[str, Any]) -> str:
    """A tensor's name in the checkpoint: that of its norm depends on whether the spec it was trained with fuses norms.

    Transformer Engine keeps a norm in the linear layer after it, but not before experts; Megatron's own layers never.
    """
    if key in tensors:
        return key
    for fused, alone in FUSED_NORMS.items():
        for ours, theirs in ((fused, alone), (alone, fused)):
            if ours in key and (found := key.replace(ours, theirs)) in tensors:
                return found
    return key


def _layout_of(tensors: Mapping[str, Any]) -> dict[str, bool]:
    """How the names are formed: layers stacked in one tensor or named one by one, gate and up in one or in two."""
    is_singleton = any(key.endswith("linear_fc1.weight_w") for key in tensors)
    return {
        "non_homogeneous_layers": any(key.startswith("decoder.layers.0.") for key in tensors),
        "singleton_local_shards": is_singleton,
    }


def sharded_state_dict(model: Any, layout: Mapping[str, bool]) -> dict[str, Any]:
    """Megatron's description of the model's tensors. Extra states are left out: they only hold FP8 history."""
    metadata = {**layout, "dp_cp_group": model.pg_collection.dp_cp}
    state = model.sharded_state_dict(prefix="", metadata=metadata)
    return {key: part for key, part in state.items() if not isinstance(part, ShardedObject)}


def sharded_parts(model: Any, layout: Mapping[str, bool]) -> list[ShardedTensor]:
    """Its leaves, each with a view of the parameter that it fills.

    Megatron's factories (SwiGLU) would load halves and concatenate them: a second copy. Applied beforehand, they leave
    views of the parameter's halves, which are filled in place.
    """
    state = sharded_state_dict(model, layout)
    apply_factories(state)
    return list(nested_values(state))


def _keys_of_all_stages(model: Any, parts: Sequence[ShardedTensor]) -> set[str]:
    """The checkpoint's names for what the whole model is made of, not only this rank's stage. Collective."""
    group = model.pg_collection.pp
    keys: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(keys, [part.key for part in parts], group=group)
    return {key for stage in keys for key in stage}


MEGATRON = CheckpointFormat(
    "a Megatron torch_dist checkpoint (metadata.json and .metadata, here or in the iter_* directory that "
    f"{TRACKER_NAME} names)",
    find_megatron_checkpoint,
    read_megatron_config,
    load_megatron_weights,
)
