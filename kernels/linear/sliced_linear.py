"""Linear layers multiplied slice by slice, so that ranks with any share of the slices compute the same bits.

For kernels that say nothing of their order: a call for a slice has the same shape however many slices a rank has.
Native layers, whose order is known, have slices of their own (kernels/native/slices.h).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH_STEP = 64  # a multiple of what kernels take of the outputs at once: so none is at an edge

_Make = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """In a binary tree over neighbours; a power of two of them."""
    while len(parts) > 1:
        parts = [low + high for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class RowSlices:
    """A row-parallel layer in fp32: its slices of the inputs are layers of their own, added up in a binary tree."""

    def __init__(self, make: _Make, num_slices: int, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """The weight is copied. num_slices: that are here, a power of two."""
        self._parts = [make(part_OI.contiguous(), None) for part_OI in weight_OI.chunk(num_slices, dim=1)]
        self._bias_O = bias_O

    def __call__(self, input_: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.finished(self.sums(input_))

    def slice_sums(self, input_: Tensor) -> list[Tensor]:
        """Of each slice, [..., O], without the bias."""
        parts = input_.chunk(len(self._parts), dim=-1)
        return [multiply(part.contiguous()) for multiply, part in zip(self._parts, parts, strict=True)]

    def sums(self, input_: Tensor) -> Tensor:
        """Of all slices, [..., O]: what those of other ranks are added to before they are `finished`."""
        return tree_sum(self.slice_sums(input_))

    def finished(self, sums: Tensor) -> Tensor:
        """With the bias."""
        return sums if self._bias_O is None else sums + self._bias_O


class ColumnSlices:
    """A layer in parts of so many outputs each, the last one filled up with zeros."""

    def __init__(self, make: _Make, width: int, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """The weight is copied. width: rounded up."""
        width = -(-width // _WIDTH_STEP) * _WIDTH_STEP
        self._num_outputs = len(weight_OI)
        missing = -self._num_outputs % width
        parts = F.pad(weight_OI, (0, 0, 0, missing)).split(width)
        biases = [None] * len(parts) if bias_O is None else F.pad(bias_O, (0, missing)).split(width)
        self._parts = [make(part_OI.contiguous(), bias) for part_OI, bias in zip(parts, biases, strict=True)]

    def __call__(self, input_: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return torch.cat([multiply(input_) for multiply in self._parts], dim=-1)[..., : self._num_outputs].contiguous()
