"""RMS norm and the gated MLP's activation, each in one pass over its input: the Python side of native/pointwise.cpp.

torch runs a bf16 RMS norm on a CPU as nine operations, and the activation as three with two temporaries.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron_medha.kernels.native_build import gomp_parallel_address, native_library
from megatron_medha.kernels.native_structs import native_struct

_DTYPES = (torch.float32, torch.bfloat16)
_Call = native_struct("PassCall")


class NativePointwise:
    """The passes of one model; holds no state but the library."""

    def __init__(self, target: str | None = None) -> None:
        """target: as for `native_library`, which may raise NativeUnavailable."""
        library = native_library(target)
        self._rms_norm, self._gated_silu = library.medha_rms_norm, library.medha_gated_silu
        self._run_parallel = gomp_parallel_address()

    def rms_norm(self, input_: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
        """[..., C] -> [..., C], computed in fp32. Raises ValueError for dtypes or sizes that do not fit."""
        width = input_.shape[-1]
        if weight_C.shape != (width,) or weight_C.dtype != input_.dtype or not weight_C.is_contiguous():
            raise ValueError(f"a weight {weight_C.dtype} {tuple(weight_C.shape)} for {input_.dtype} of width {width}")
        return self._pass(self._rms_norm, input_, width, weight_C, epsilon)

    def gated_silu(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]: silu of the first half, times the second."""
        return self._pass(self._gated_silu, gate_and_up, gate_and_up.shape[-1] // 2, None, 0.0)

    def _pass(
        self, run: ctypes._CFuncPtr, input_: Tensor, width: int, weight_C: Tensor | None, epsilon: float
    ) -> Tensor:
        if input_.dtype not in _DTYPES:
            raise ValueError(f"{input_.dtype} is neither float32 nor bfloat16")
        input_ = input_.contiguous()
        out = torch.empty(*input_.shape[:-1], width, dtype=input_.dtype)
        call = _Call(
            input_.dtype == torch.bfloat16,
            self._run_parallel,
            torch.get_num_threads(),
            out.numel() // width,
            width,
            input_.data_ptr(),
            None if weight_C is None else weight_C.data_ptr(),
            out.data_ptr(),
            epsilon,
        )
        if run(ctypes.byref(call)):
            raise MemoryError("the library could not allocate its working memory")
        return out
