"""Linear layers whose weights are kept in int8 with a scale per output; what they multiply stays bf16."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.native_build import NativeUnavailable, native_library

_INT8_MAX = 127  # -128 is left out: a weight and its negative are rounded alike
_MIN_SCALE = 1e-12  # rows of zeros
_SLICE_OUTPUTS = 4096  # rounded at a time: in fp32 an output layer of 128K x 4K takes 2 GB


def check_weight_dtype(name: str, *, dtype: torch.dtype) -> None:
    """Raises ConfigError where the weights of a model in that dtype cannot be kept so."""
    if name == "auto":
        return
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"model.weight_dtype=int8: needs model.dtype=bfloat16, not {str(dtype).removeprefix('torch.')}"
        )
    try:
        native_library()
    except NativeUnavailable as error:
        raise ConfigError(f"model.weight_dtype=int8: cannot be had here: {error}") from error


def int8_linear(weight_OI: Tensor, bias_O: Tensor | None, group: dist.ProcessGroup | None = None) -> NativeLinear:
    """A layer over a rounded copy of a bf16 weight.

    group: of the ranks that hold the other inputs of the same outputs. They agree on the scales, so that the layer is
    the same one at any degree of tensor parallelism.
    """
    largest_O = weight_OI.abs().amax(dim=1).float()
    if group is not None:
        dist.all_reduce(largest_O, dist.ReduceOp.MAX, group=group)
    scale_O = (largest_O / _INT8_MAX).clamp_(min=_MIN_SCALE)
    rounded_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    for first in range(0, len(weight_OI), _SLICE_OUTPUTS):
        part = slice(first, first + _SLICE_OUTPUTS)
        rounded_OI[part] = (weight_OI[part].float() / scale_O[part, None]).round_()
    return NativeLinear(rounded_OI, bias_O, scale_O=scale_O)
