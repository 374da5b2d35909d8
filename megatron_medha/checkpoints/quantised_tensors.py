"""Tensors that are stored quantised, read box by box as the floats they stand for.

Block FP8 (DeepSeek, Qwen) and the 8-bit floats of compressed-tensors: e4m3 with a scale beside it. MXFP4 (gpt-oss):
blocks of 32 numbers in 16 bytes, low half first, and the exponent of a power of two for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_medha.checkpoints.weight_checks import StoredHeader
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.hf_quantisation import Quantisation

_E4M3 = "F8_E4M3"
_BLOCKS, _SCALES = "_blocks", "_scales"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4_BLOCK = 32
_FP4_BIAS = 127

Box = tuple[slice, ...]
Slices = Callable[[str], Any]  # a stored tensor, by key, of which boxes are read


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """A tensor of floats, whatever its form in the file."""

    header: StoredHeader
    read: Callable[[Slices, Box], Tensor]


def float_tensors(headers: Mapping[str, StoredHeader], quantisation: Quantisation | None) -> dict[str, FloatTensor]:
    """What is stored, by the keys that it has without quantisation.

    Raises CheckpointError for scales whose shape does not fit their weights.
    """
    plain = {key: FloatTensor(header, _plain(key)) for key, header in headers.items()}
    if quantisation is None:
        return plain
    found = {}
    for key in headers:
        if quantisation.has_fp4_blocks:
            name, tensor = key.removesuffix(_BLOCKS), _of_fp4(key, headers)
        else:
            name, tensor = key, _of_fp8(key, headers, quantisation)
        if tensor is not None:
            found[name] = tensor
    read = {part for key in found for part in _parts(key, quantisation)}
    return {key: tensor for key, tensor in plain.items() if key not in read} | found


def _parts(key: str, quantisation: Quantisation) -> tuple[str, ...]:
    """The stored tensors that a quantised one is made of, and those of activations, which are not quantised here."""
    if quantisation.has_fp4_blocks:
        return key + _BLOCKS, key + _SCALES
    module = key.removesuffix("weight")
    return key, key + quantisation.scale_name, module + "input_scale", module + "activation_scale"


def _plain(key: str) -> Callable[[Slices, Box], Tensor]:
    def read(slices: Slices, box: Box) -> Tensor:
        found: Tensor = slices(key)[box]
        return found

    return read


def _of_fp8(key: str, headers: Mapping[str, StoredHeader], quantisation: Quantisation) -> FloatTensor | None:
    header, scale_key = headers[key], key + quantisation.scale_name
    if header.dtype != _E4M3 or scale_key not in headers or len(header.shape) != 2:
        return None
    num_outputs, num_inputs = header.shape
    scale_shape = headers[scale_key].shape
    row_block, column_block = quantisation.block or (num_outputs, num_inputs)
    if quantisation.block is None and scale_shape[:1] == (num_outputs,):
        row_block = 1
    wanted = -(-num_outputs // row_block) * -(-num_inputs // column_block)
    if wanted != torch.Size(scale_shape).numel():
        raise CheckpointError(
            f"{headers[scale_key].path}: tensor {scale_key} has shape {list(scale_shape)}; {key} of shape "
            f"{list(header.shape)} needs {wanted} scales"
        )

    def read(slices: Slices, box: Box) -> Tensor:
        rows, columns = box
        scales = slices(scale_key)[:].float().reshape(-1, -(-num_inputs // column_block))
        of_rows = torch.arange(rows.start, rows.stop) // row_block
        of_columns = torch.arange(columns.start, columns.stop) // column_block
        found: Tensor = slices(key)[box].float() * scales[of_rows][:, of_columns]
        return found

    return FloatTensor(header._replace(dtype="F32"), read)


def _of_fp4(key: str, headers: Mapping[str, StoredHeader]) -> FloatTensor | None:
    """[experts, outputs, blocks, bytes], of a tensor [experts, inputs, outputs]."""
    header, scale_key = headers[key], key.removesuffix(_BLOCKS) + _SCALES
    if not key.endswith(_BLOCKS) or scale_key not in headers or len(header.shape) != 4:
        return None
    num_experts, num_outputs, num_blocks, num_bytes = header.shape
    if num_bytes * 2 != _FP4_BLOCK or headers[scale_key].shape != header.shape[:3]:
        raise CheckpointError(
            f"{header.path}: tensor {key} has shape {list(header.shape)}, {scale_key} "
            f"{list(headers[scale_key].shape)}; there must be {_FP4_BLOCK // 2} bytes for each scale"
        )

    def read(slices: Slices, box: Box) -> Tensor:
        experts, inputs, outputs = box
        blocks = slice(inputs.start // _FP4_BLOCK, -(-inputs.stop // _FP4_BLOCK))
        packed = slices(key)[experts, outputs, blocks]
        exponents = slices(scale_key)[experts, outputs, blocks].int() - _FP4_BIAS
        numbers = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        values = torch.ldexp(torch.tensor(_FP4)[numbers.int()], exponents[..., None]).flatten(-2)
        first = inputs.start - blocks.start * _FP4_BLOCK
        return values[..., first : first + inputs.stop - inputs.start].transpose(-1, -2)

    shape = (num_experts, num_blocks * _FP4_BLOCK, num_outputs)
    return FloatTensor(StoredHeader(header.path, shape, "F32"), read)
