"""Norms and the MLP's activation, each in one pass over its input: the Python side of native/pointwise.cpp.

torch runs a bf16 RMS norm on a CPU as nine operations, and a gated activation as three with two temporaries.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron_medha.kernels.native_build import gomp_parallel_address, native_library
from megatron_medha.kernels.native_structs import native_struct

_DTYPES = (torch.float32, torch.bfloat16)
_KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "squared_relu", "relu", "sigmoid")  # as in activation.h
_Norm, _Activation, _Call = map(native_struct, ("Norm", "Activation", "PassCall"))


class NativeNorm:
    """RMS norm, or a LayerNorm if it takes off the mean; [..., C] -> [..., C], computed in fp32."""

    def __init__(
        self,
        weight_C: Tensor,
        epsilon: float,
        bias_C: Tensor | None = None,
        *,
        is_centred: bool = False,
        target: str | None = None,
    ) -> None:
        """Weights are copied. target: as for `native_library`, which may raise NativeUnavailable."""
        self._run = native_library(target).medha_norm
        self.width = len(weight_C)
        self._weight_C = weight_C.detach().float().clone()
        self._bias_C = None if bias_C is None else bias_C.detach().float().clone()
        bias_ptr = None if self._bias_C is None else self._bias_C.data_ptr()
        self.struct = _Norm(self._weight_C.data_ptr(), bias_ptr, epsilon, is_centred)

    def __call__(self, input_: Tensor) -> Tensor:
        """Raises ValueError for another dtype or size."""
        if input_.shape[-1] != self.width:
            raise ValueError(f"{tuple(input_.shape)} for a norm of width {self.width}")
        return _passed(self._run, input_, self.width, norm=ctypes.addressof(self.struct))


class NativeActivation:
    """An MLP's activation, times a second half of its inputs if there is a gate: [..., F or 2F] -> [..., F]."""

    def __init__(
        self,
        kind: str = "silu",
        *,
        has_gate: bool = True,
        clamp: float | None = None,
        gate_offset: float = 0.0,
        target: str | None = None,
    ) -> None:
        """clamp: with a gate the first half is cut off above it, the second on both sides.

        target: as for `native_library`, which may raise NativeUnavailable. Raises ValueError for another kind.
        """
        if kind not in _KINDS:
            raise ValueError(f"activation {kind!r}: known are {', '.join(_KINDS)}")
        self._run = native_library(target).medha_activate
        self.has_gate = has_gate
        self.struct = _Activation(_KINDS.index(kind), has_gate, clamp or 0.0, gate_offset)

    def __call__(self, input_: Tensor) -> Tensor:
        """Raises ValueError for another dtype."""
        width = input_.shape[-1] // (2 if self.has_gate else 1)
        return _passed(self._run, input_, width, activation=ctypes.addressof(self.struct))


def _passed(run: ctypes._CFuncPtr, input_: Tensor, width: int, **what: int) -> Tensor:
    if input_.dtype not in _DTYPES:
        raise ValueError(f"{input_.dtype} is neither float32 nor bfloat16")
    input_ = input_.contiguous()
    out = torch.empty(*input_.shape[:-1], width, dtype=input_.dtype)
    call = _Call(
        is_bf16=input_.dtype == torch.bfloat16,
        run_parallel=gomp_parallel_address(),
        num_threads=torch.get_num_threads(),
        num_rows=out.numel() // width,
        width=width,
        out=out.data_ptr(),
        **{"in": input_.data_ptr(), **what},
    )
    if run(ctypes.byref(call)):
        raise MemoryError("the library could not allocate its working memory")
    return out
