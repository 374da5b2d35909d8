"""GGUF files: their tensors dequantised into a Megatron model's parameters. Config: gguf_config.py."""

from __future__ import annotations

import functools
import mmap
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_medha.checkpoints.checkpoint_format import CheckpointFormat, Progress
from megatron_medha.checkpoints.hf_checkpoint import ONE_BY_ONE
from megatron_medha.checkpoints.megatron_checkpoint import sharded_parts
from megatron_medha.checkpoints.placements import Box, checked_placements, model_slice_of, zero_padding_rows
from megatron_medha.checkpoints.weight_checks import StoredHeader, refuse_larger_model, refuse_non_finite
from megatron_medha.core.errors import CheckpointError, DependencyError
from megatron_medha.models.gguf_config import ROPE_FACTORS, gguf_model_config, gguf_tensor_rows
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import open_regular
from megatron_medha.safe_files.gguf_file import GGUFFile, GGUFTensor, read_gguf

_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}  # by ggml's type
_ONE_ROW = ".ffn_gate_inp_shexp.weight"
_UNREAD = ROPE_FACTORS.replace(".", r"\.")  # the config has what it says


def find_gguf(path: Path) -> Path | None:
    """The file: the given one, or the only one in the directory. Raises CheckpointError where there are several."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:8])
        raise CheckpointError(
            f"{path}: holds {len(found)} GGUF files: {names}. Name one, as checkpoint={found[0]}; the parts of a split "
            "file are put together by llama.cpp's llama-gguf-split --merge"
        )
    return found[0] if found else None


def read_gguf_checkpoint_config(path: Path) -> ModelConfig:
    """The architecture, from the file's metadata. Raises what gguf_model_config raises; its tensors must be there."""
    file = read_gguf(path)
    embedding = file.tensors.get("token_embd.weight")
    config = gguf_model_config(file, _FLOATS.get(-1 if embedding is None else embedding.type_id, "bfloat16"))
    refuse_larger_model(config, path, sum(prod(tensor.shape) for tensor in file.tensors.values()))
    _headers(file)
    return config


@torch.no_grad()
def load_gguf_weights(model: nn.Module, config: ModelConfig, path: Path, progress: Progress) -> None:
    """Fill the model's parameters from the file, dequantised row by row.

    All headers are checked first, so nothing is copied when a tensor is missing, surplus or of the wrong shape.
    """
    file = read_gguf(path)
    rows, parts = gguf_tensor_rows(file), sharded_parts(model, ONE_BY_ONE)
    expected = checked_placements(rows, parts, config, _headers(file), path, "its metadata say", _UNREAD)
    zero_padding_rows(dict(model.named_parameters()), config, model_slice_of(model))
    not_finite = []
    with open_regular(path) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        for number, key in enumerate(sorted(expected), 1):
            if not expected[key].fill(functools.partial(_floats, mapping, file.tensors[key])):
                not_finite.append(key)
            progress(f"weights from {path.name}", number / len(expected))
    refuse_non_finite(path, not_finite)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise DependencyError(
            "a GGUF file needs the package gguf: pip install 'megatron_medha[gguf]', or pip install gguf"
        ) from error
    return gguf


@functools.cache
def _is_readable(type_id: int) -> bool:
    """Whether the package makes floats of that type of numbers."""
    gguf = _gguf()
    try:
        kind = gguf.GGMLQuantizationType(type_id)
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def _headers(file: GGUFFile) -> dict[str, StoredHeader]:
    """Of every tensor. Raises CheckpointError if one is stored in an unknown way, or is not there to its end."""
    found = {}
    for key, tensor in file.tensors.items():
        if not _is_readable(tensor.type_id):
            raise CheckpointError(f"{file.path}: tensor {key} is of ggml's type {tensor.type_id}, which is not read")
        if (end := tensor.start + _num_bytes(tensor)) > file.num_bytes:
            raise CheckpointError(
                f"{file.path}: ends at byte {file.num_bytes}, its tensor {key} at byte {end}; it is cut off: download "
                "it again"
            )
        # A gate for one expert has one row, which the file leaves out.
        shape = (1, *tensor.shape) if key.endswith(_ONE_ROW) else tensor.shape
        found[key] = StoredHeader(file.path, shape, "F32")
    return found


def _row_bytes(tensor: GGUFTensor) -> int:
    gguf = _gguf()
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_id)]
    row_size = tensor.shape[-1] if tensor.shape else 1
    if row_size % block_size:
        raise CheckpointError(f"a row of {row_size} numbers is stored in blocks of {block_size}; the file is damaged")
    return int(row_size // block_size * block_bytes)


def _num_bytes(tensor: GGUFTensor) -> int:
    return prod(tensor.shape[:-1]) * _row_bytes(tensor)


def _floats(mapping: mmap.mmap, tensor: GGUFTensor, box: Box) -> Tensor:
    """That box of a tensor, in fp32. Of a stack of matrices it is of one of them."""
    gguf = _gguf()
    rows = box[-2] if len(tensor.shape) > 1 else slice(0, 1)
    if len(tensor.shape) == 3:
        assert box[0].stop - box[0].start == 1, "one expert at a time"
        before = box[0].start * tensor.shape[1]
        rows = slice(before + rows.start, before + rows.stop)
    row_bytes = _row_bytes(tensor)
    start = tensor.start + rows.start * row_bytes
    stored = np.frombuffer(mapping[start : start + (rows.stop - rows.start) * row_bytes], np.uint8)
    kind = gguf.GGMLQuantizationType(tensor.type_id)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        floats = stored.view(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16).astype(np.float32)
    else:
        floats = gguf.quants.dequantize(stored.reshape(-1, row_bytes), kind)
    return torch.from_numpy(floats.reshape(rows.stop - rows.start, -1)[:, box[-1]].reshape(
        [part.stop - part.start for part in box]
    ).copy())  # fmt: skip


GGUF = CheckpointFormat(
    "a GGUF file (*.gguf)",
    find_gguf,
    lambda _, path: read_gguf_checkpoint_config(path),
    load_gguf_weights,
)
