"""Linear layers with bf16, int8 or int4 weights and fp32 arithmetic: the Python side of native/linear.cpp.

The weight keeps its stored size, which decodes are bound by. Products are those of bf16 matrix tiles (AMX) where
there are any, else fp32 ones. An output depends neither on other rows nor on the number of threads, to the last bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medha.kernels.native_build import gomp_parallel_address, native_library
from megatron_medha.kernels.native_structs import native_struct

_Weight, _Call = native_struct("Weight"), native_struct("LinearCall")
_BF16, _INT8, _INT4 = range(3)  # WeightKind
_PANEL = 64  # outputs that lie together; a multiple of every instruction set's register tile
_DEPTH = 32  # inputs that a matrix tile takes at once
INT4_GROUP = 32  # inputs of one output that have a scale together

_PIECE_BYTES = 64 << 20
_LINE_BYTES = 64

_room = torch.empty(0, dtype=torch.uint8)  # what is left of the last piece


class NativeLinear:
    """One layer with its weight packed: [..., I] -> [..., O], bf16."""

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        target: str | None = None,
        *,
        scale: Tensor | None = None,
        num_slices: int = 1,
    ) -> None:
        """weight: bf16; or int8 with an fp32 scale [O]; or int8 of -8 to 7 with a bf16 scale [O, groups of inputs].

        The last is stored in 4 bits; its scales have 5 significant bits. bias: bf16. All are copied.
        target: as for `native_library`, which may raise NativeUnavailable. num_slices: of the inputs, 1, 2, 4 or 8,
        in int4 each of whole groups; their sums are added up in a binary tree (native/slices.h).
        Raises ValueError for other dtypes and slices.
        """
        stored = torch.bfloat16 if scale is None else torch.int8
        if weight_OI.dtype != stored or bias_O is not None and bias_O.dtype != torch.bfloat16:
            raise ValueError(f"a native linear layer is bfloat16, or int8 with scales, not {weight_OI.dtype}")
        library = native_library(target)
        self._run, self._finish = library.medha_linear, library.medha_finish
        self._run_parallel = gomp_parallel_address()
        self.num_outputs, self.num_inputs = weight_OI.shape
        num_groups = -(-self.num_inputs // INT4_GROUP)
        kinds = {((self.num_outputs,), torch.float32): _INT8, ((self.num_outputs, num_groups), torch.bfloat16): _INT4}
        kind = _BF16 if scale is None else kinds.get((tuple(scale.shape), scale.dtype))
        if kind is None:
            raise ValueError(f"scales {scale.dtype} {tuple(scale.shape)} for {self.num_outputs} outputs")
        step = INT4_GROUP if kind == _INT4 and num_slices > 1 else 1
        if num_slices not in (1, 2, 4, 8) or self.num_inputs % (step * num_slices):
            raise ValueError(f"{num_slices} slices of {self.num_inputs} inputs: each must be a multiple of {step}")
        weight_OSI = weight_OI.detach().unflatten(1, (num_slices, -1))
        missing = -weight_OSI.shape[2] % _DEPTH
        padded_OI = F.pad(weight_OSI, (0, missing, 0, 0, 0, -self.num_outputs % _PANEL)).flatten(1)
        packed = _int4_groups(padded_OI, scale) if kind == _INT4 else _in_panels(padded_OI, 2 if kind == _BF16 else 1)
        self._packed = _weight_memory(packed.nbytes).view(packed.dtype).view(packed.shape).copy_(packed)
        self._scales = scale.detach().clone() if kind == _INT8 else None
        self._bias = None if bias_O is None else bias_O.detach().clone()
        tensors = (self._packed, self._scales, self._bias)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.weight = _Weight(*pointers, kind, num_slices)
        self._unfinished = _Weight(pointers[0], None, None, kind, num_slices)

    def __call__(self, input_: Tensor) -> Tensor:
        """Raises ValueError for another dtype or size."""
        out = torch.empty(*input_.shape[:-1], self.num_outputs, dtype=torch.bfloat16)
        self._multiply(input_, self.weight, out=out.data_ptr())
        return out

    def slice_sums(self, input_: Tensor) -> list[Tensor]:
        """Of each slice of the inputs, [..., O], fp32, scaled and without the bias."""
        weight = _Weight(self.weight.values, self.weight.scales, None, self.weight.kind, self.weight.num_slices)
        parts = [torch.empty(*input_.shape[:-1], self.num_outputs) for _ in range(weight.num_slices)]
        for number, part in enumerate(parts, start=1):
            self._multiply(input_, weight, wide_out=part.data_ptr(), only_slice=number)
        return parts

    def sums(self, input_: Tensor) -> Tensor:
        """[..., O], fp32: what those of ranks with other inputs are added to before they are `finished`."""
        sums = torch.empty(*input_.shape[:-1], self.num_outputs)
        self._multiply(input_, self._unfinished, wide_out=sums.data_ptr())
        return sums

    def finished(self, sums: Tensor) -> Tensor:
        """Scaled, with the bias, rounded; sums: as `sums` gives them."""
        assert sums.dtype == torch.float32 and sums.is_contiguous() and sums.shape[-1] == self.num_outputs
        out = torch.empty(sums.shape, dtype=torch.bfloat16)
        call = _Call(
            num_rows=sums.numel() // self.num_outputs, num_outputs=self.num_outputs, weight=self.weight,
            out=out.data_ptr(),
        )  # fmt: skip
        self._finish(ctypes.byref(call), sums.data_ptr())
        return out

    def _multiply(self, input_: Tensor, weight: ctypes.Structure, **outputs: int) -> None:
        if input_.dtype != torch.bfloat16 or input_.shape[-1] != self.num_inputs:
            raise ValueError(f"{input_.dtype} {tuple(input_.shape)} for a layer of {self.num_inputs} bfloat16 inputs")
        input_ = input_.contiguous()
        call = _Call(
            num_rows=input_.numel() // self.num_inputs,
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            weight=weight,
            run_parallel=self._run_parallel,
            num_threads=torch.get_num_threads(),
            **{"in": input_.data_ptr()},
            **outputs,
        )
        if self._run(ctypes.byref(call)):
            raise MemoryError("the linear library could not allocate its working memory")


def _in_panels(weight_OI: Tensor, together: int) -> Tensor:
    """[O, I] -> [O/64, I/together, 64, together]."""
    return weight_OI.view(-1, _PANEL, weight_OI.shape[1] // together, together).transpose(1, 2)


def _int4_groups(weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Int4Group of native/linear_output.h: [O/64, G, bytes of 64 bf16 scales and of 16 x 64 pairs of weights]."""
    scale_OG = F.pad(scale_OG.detach(), (0, 0, 0, len(weight_OI) - len(scale_OG)))
    scales = scale_OG.view(-1, _PANEL, scale_OG.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
    halves = _in_panels((weight_OI + 8).view(torch.uint8), 2)
    pairs = (halves[..., 0] | halves[..., 1] << 4).reshape(*scales.shape[:2], -1)
    return torch.cat([scales, pairs], dim=-1)


def _weight_memory(num_bytes: int) -> Tensor:
    """Uninitialised memory for one weight, cut from large pieces, so that weights lie one behind the other."""
    global _room
    size = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
    if len(_room) < size:
        _room = _huge_pages(max(size, _PIECE_BYTES))
    taken, _room = _room[:num_bytes], _room[size:]
    return taken


def _huge_pages(num_bytes: int) -> Tensor:
    """Memory in pages of 2 MiB where Linux has them. Decodes, which read all weights, take 0.82 to 1.0 of the time."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux; a Linux built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
