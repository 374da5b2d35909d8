"""Linear layers whose weights are kept in int8 or int4 with scales; what they multiply stays bf16."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.linear.native_linear import INT4_GROUP, NativeLinear
from megatron_medha.kernels.native_build import NativeUnavailable, native_library

_INT8_MAX = 127  # -128 is left out: a weight and its negative are rounded alike
_MIN_SCALE = 1e-12  # rows of zeros
_SLICE_OUTPUTS = 4096  # rounded at a time: in fp32 an output layer of 128K x 4K takes 2 GB
# What a group's largest weight becomes, of which the one with the least squared error is taken. With -8 the largest is
# met exactly and all 16 values are used; a smaller one cuts off the largest, and is finer for the rest.
_INT4_LARGEST = (-8.0, -9.0, 7.0, 8.0)
_INT4_SLICE_OUTPUTS = 512


def check_weight_dtype(name: str, *, dtype: torch.dtype) -> None:
    """Raises ConfigError where the weights of a model in that dtype cannot be kept so."""
    if name == "auto":
        return
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"model.weight_dtype={name}: needs model.dtype=bfloat16, not {str(dtype).removeprefix('torch.')}"
        )
    try:
        native_library()
    except NativeUnavailable as error:
        raise ConfigError(f"model.weight_dtype={name}: cannot be had here: {error}") from error


def int8_linear(
    weight_OI: Tensor, bias_O: Tensor | None, group: dist.ProcessGroup | None = None, *, num_slices: int = 1
) -> NativeLinear:
    """A layer over a rounded copy of a bf16 weight, with a scale per output.

    group: of the ranks that hold the other inputs of the same outputs. They agree on the scales, so that the layer is
    the same one at any degree of tensor parallelism. num_slices: see NativeLinear.
    """
    largest_O = weight_OI.abs().amax(dim=1).float()
    if group is not None:
        dist.all_reduce(largest_O, dist.ReduceOp.MAX, group=group)
    scale_O = (largest_O / _INT8_MAX).clamp_(min=_MIN_SCALE)
    rounded_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    for first in range(0, len(weight_OI), _SLICE_OUTPUTS):
        part = slice(first, first + _SLICE_OUTPUTS)
        rounded_OI[part] = (weight_OI[part].float() / scale_O[part, None]).round_()
    return NativeLinear(rounded_OI, bias_O, scale=scale_O, num_slices=num_slices)


def int4_linear(weight_OI: Tensor, bias_O: Tensor | None, *, num_slices: int = 1) -> NativeLinear:
    """A layer over a rounded copy of a bf16 weight, with a scale for each 32 inputs of an output.

    It is the same one at any degree of tensor parallelism that divides the inputs by a multiple of 32. num_slices: see
    NativeLinear.
    """
    num_outputs, num_inputs = weight_OI.shape
    rounded_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    scale_OG = torch.empty(num_outputs, -(-num_inputs // INT4_GROUP), dtype=torch.bfloat16)
    for first in range(0, num_outputs, _INT4_SLICE_OUTPUTS):
        part = slice(first, first + _INT4_SLICE_OUTPUTS)
        padded_OI = F.pad(weight_OI[part].float(), (0, -num_inputs % INT4_GROUP))
        rounded_OGI, scale_OG[part] = _int4_groups(padded_OI.unflatten(1, (-1, INT4_GROUP)))
        rounded_OI[part] = rounded_OGI.flatten(1)[:, :num_inputs]
    return NativeLinear(rounded_OI, bias_O, scale=scale_OG, num_slices=num_slices)


def _int4_groups(weight_OGI: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of groups as -8 to 7, and the groups' scales, bf16 with 5 significant bits."""
    largest_OG1 = weight_OGI.gather(2, weight_OGI.abs().argmax(dim=2, keepdim=True))
    tried: list[tuple[Tensor, Tensor]] = []
    errors: list[Tensor] = []
    for becomes in _INT4_LARGEST:
        scale_OG1 = _five_bits(largest_OG1 / becomes)
        rounded_OGI = (weight_OGI / torch.where(scale_OG1 == 0, 1.0, scale_OG1)).round_().clamp_(-8, 7)
        errors.append((rounded_OGI * scale_OG1 - weight_OGI).square_().sum(dim=2))
        tried.append((rounded_OGI.to(torch.int8), scale_OG1[:, :, 0].bfloat16()))
    best_OG = torch.stack(errors).argmin(dim=0)
    (best_OGI, best_scale_OG), *others = tried
    for number, (rounded_OGI, scale_OG) in enumerate(others, start=1):
        best_OGI = torch.where((best_OG == number)[:, :, None], rounded_OGI, best_OGI)
        best_scale_OG = torch.where(best_OG == number, scale_OG, best_scale_OG)
    return best_OGI, best_scale_OG


def _five_bits(x: Tensor) -> Tensor:
    """Rounded to 5 significant bits, with which a product of at most 3 more is a bf16 number. Tiny ones become 0."""
    fraction, exponent = torch.frexp(x)
    return torch.where(exponent < -100, 0.0, torch.ldexp((fraction * 32).round_(), exponent - 5))
