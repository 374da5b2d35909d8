"""Hugging Face checkpoints: streaming their safetensors into a Megatron model's parameters. Config: hf_config.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_medha.checkpoints.checkpoint_format import CheckpointFormat, Progress
from megatron_medha.checkpoints.megatron_checkpoint import sharded_parts
from megatron_medha.checkpoints.placements import (
    EMBEDDING_NAME,
    HEAD_NAME,
    Placement,
    checked_placements,
    model_slice_of,
    zero_padding_rows,
)
from megatron_medha.checkpoints.quantised_tensors import FloatTensor, float_tensors
from megatron_medha.checkpoints.weight_checks import StoredHeader, refuse_larger_model, refuse_non_finite
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.hf_config import hf_quantisation, hf_tensor_rows, hf_unread_keys, read_hf_config
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import open_regular, path_inside, read_bytes

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
ONE_BY_ONE = {"non_homogeneous_layers": True}  # parts named layer by layer
_NO_WEIGHTS = ("consolidated", "adapter_model")
_MAX_INDEX_BYTES = 64 << 20
_MAX_HEADER_BYTES = 64 << 20  # 100 bytes a tensor


class _Index(msgspec.Struct):
    """What is read of the index."""

    weight_map: dict[str, str]


def read_hf_checkpoint_config(directory: Path) -> ModelConfig:
    """The architecture in config.json, if the weights suffice for it."""
    config = read_hf_config(directory)
    tensors = float_tensors(_headers(directory), hf_quantisation(directory))
    num_stored = sum(prod(tensor.header.shape) for tensor in tensors.values())
    refuse_larger_model(config, directory / "config.json", num_stored)
    return config


@torch.no_grad()
def load_hf_weights(
    model: nn.Module,
    config: ModelConfig,
    directory: Path,
    progress: Progress,
    changed: Callable[[Mapping[str, FloatTensor]], Mapping[str, FloatTensor]] = lambda tensors: tensors,
    further: Mapping[str, StoredHeader] | None = None,
) -> None:
    """Fill the model's parameters from the safetensors in the directory, one tensor at a time.

    changed: what is loaded instead of the stored tensors. further: stored tensors that it reads, from other files.

    All headers are checked first, so nothing is copied when a tensor is missing, surplus or of the wrong shape.
    Values are converted to the parameters' dtype and device. Raises CheckpointError naming file and key.
    """
    stored = _headers(directory)
    tensors = changed(float_tensors(stored, hf_quantisation(directory)))
    stored = {**stored, **(further or {})}
    headers = {key: tensor.header for key, tensor in tensors.items()}
    rows = hf_tensor_rows(directory)
    expected = checked_placements(
        rows,
        sharded_parts(model, ONE_BY_ONE),
        config,
        headers,
        _where_expected(directory),
        "config.json says",
        hf_unread_keys(directory),
    )
    zero_padding_rows(dict(model.named_parameters()), config, model_slice_of(model))
    num_loaded = 0
    for path in sorted({headers[key].path for key in expected}):
        not_finite = []
        with ExitStack() as files:
            slices = _slices(files, path, stored)
            for key in sorted(key for key in expected if headers[key].path == path):
                if not expected[key].fill(partial(tensors[key].read, slices)):
                    not_finite.append(key)
                num_loaded += 1
                progress(f"weights from {path.name}", num_loaded / len(expected))
        refuse_non_finite(path, not_finite)
    if config.has_tied_embeddings:
        keys = {row.parameter: row.key for row in rows if row.parameter in (EMBEDDING_NAME, HEAD_NAME)}
        _check_tied(expected, headers, keys[EMBEDDING_NAME], keys[HEAD_NAME])


def _slices(files: ExitStack, first: Path, stored: Mapping[str, StoredHeader]) -> Callable[[str], Any]:
    """What gives a stored tensor of that file, or of others (a scale may be elsewhere), to read boxes of."""
    open_files = {first: files.enter_context(opened(first))}

    def slices(key: str) -> Any:
        path = stored[key].path
        if path not in open_files:
            open_files[path] = files.enter_context(opened(path))
        return open_files[path].get_slice(key)

    return slices


def _check_tied(
    expected: Mapping[str, Placement], headers: Mapping[str, StoredHeader], embedding: str, head: str
) -> None:
    """Raise CheckpointError if a head is stored beside the embedding and is not the same."""
    if embedding not in expected or head not in headers:
        return
    path = headers[head].path
    with opened(path) as file:
        for fill in expected[embedding].fills:
            stored = file.get_slice(head)[fill.box]
            if not torch.equal(stored.to(fill.view.device, fill.view.dtype), fill.view):
                why = "tie_word_embeddings is true"
                raise CheckpointError(f"{path}: tensor {head} differs from {embedding}, but {why}")


def hf_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, index or not; empty when it has none.

    Where two saves left a single file and an index of shards, the single file is taken, as by transformers.
    Raises CheckpointError when the index is needed and is broken or names a file that is not there.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if single.is_file():
        with suppress(CheckpointError):
            paths = _indexed_files(index)
            if single in paths and all(path.is_file() for path in paths):
                return paths
        return [single]
    if index.is_file():
        paths = _indexed_files(index)
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, though {INDEX_NAME} names it")
        return paths
    # "consolidated" files hold the same weights again, in Mistral's own naming; an adapter's are no model.
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith(_NO_WEIGHTS))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(read_bytes(index, _MAX_INDEX_BYTES), type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index of tensors: {error}") from error


def _indexed_files(index: Path) -> list[Path]:
    names = set(_weight_map(index).values())
    if not names:
        raise CheckpointError(f"{index}: weight_map is empty")
    return [path_inside(index.parent, name, index.name) for name in sorted(names)]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its header checked. Raises CheckpointError naming it when it is damaged."""
    try:
        with open_regular(path) as start:
            num_header_bytes = int.from_bytes(start.read(8) or b"", "little")
        if num_header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: its header takes {num_header_bytes} bytes; damaged")
        # Reading, too, may fail: a file on a network mount can be cut short after it was opened.
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors, damaged or incomplete: {error}") from error


def _headers(directory: Path) -> dict[str, StoredHeader]:
    return headers_of(hf_weight_files(directory))


def headers_of(paths: Sequence[Path]) -> dict[str, StoredHeader]:
    """Of every tensor, by key. Raises CheckpointError if one is in two files that differ in it."""
    found: dict[str, StoredHeader] = {}
    for path in paths:
        with opened(path) as file:
            for key in sorted(file.keys()):
                first = found.get(key)
                if first is None:
                    header = file.get_slice(key)
                    found[key] = StoredHeader(path, tuple(header.get_shape()), header.get_dtype())
                elif not _is_same_tensor(file, first.path, key):
                    raise CheckpointError(f"{path}: tensor {key} is in {first.path.name} too, with other values")
    return found


def _is_same_tensor(file: Any, other: Path, key: str) -> bool:
    with opened(other) as second:
        is_alike = file.get_slice(key).get_shape() == second.get_slice(key).get_shape()
        return is_alike and torch.equal(file.get_tensor(key), second.get_tensor(key))


def _where_expected(directory: Path) -> Path:
    index = directory / INDEX_NAME
    if index.is_file():
        return index
    paths = hf_weight_files(directory)
    return paths[0] if len(paths) == 1 else directory


HUGGING_FACE = CheckpointFormat(
    "a Hugging Face checkpoint (config.json and *.safetensors)",
    lambda directory: directory if (directory / "config.json").is_file() and hf_weight_files(directory) else None,
    lambda directory, _: read_hf_checkpoint_config(directory),
    load_hf_weights,
)
