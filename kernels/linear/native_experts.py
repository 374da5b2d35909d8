"""Routed experts of a layer in one native call: the Python side of native/experts.cpp.

Each expert's weights are read once for all tokens that are sent to it. A token's output depends neither on the other
tokens nor on the number of threads, to the last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.native_pointwise import NativeActivation
from megatron_medha.kernels.native_build import gomp_parallel_address, native_library
from megatron_medha.kernels.native_structs import native_struct

_Expert, _Router, _Layer, _Call = map(native_struct, ("Expert", "Router", "ExpertsLayer", "ExpertsCall"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """How a router chooses experts and weighs them, as in core/model_spec.py."""

    num_chosen: int
    is_sigmoid: bool = False
    is_scored_first: bool = False
    is_wide: bool = False  # scores in fp32; False: rounded to bf16 as Megatron's are
    num_groups: int = 0
    num_chosen_groups: int = 0
    weight_scale: float = 0.0  # 0: the weights are not scaled


@dataclass(frozen=True, slots=True)
class RoutedExpert:
    """Both layers of an expert."""

    up: NativeLinear  # with a gate both halves
    down: NativeLinear
    down_bias_C: Tensor | None = None  # bf16; weighted as the output is, so the layer has none of its own


class NativeExperts:
    """The weighted sum of each token's experts: [T, C] -> [T, C], bf16."""

    def __init__(
        self,
        router: NativeLinear,
        options: RouterOptions,
        experts: Sequence[RoutedExpert | None],
        activation: NativeActivation,
        *,
        choice_bias_N: Tensor | None = None,
        adds_biases: bool = True,
        target: str | None = None,
    ) -> None:
        """experts: by number, all bf16 or all int8; None: it is on another rank.

        choice_bias_N: fp32. adds_biases: those of second layers; False: another rank does.
        target: as for `native_library`, which may raise. Raises ValueError for layers that do not fit one another.
        """
        self._run = native_library(target).medha_experts
        self._kept = router, experts, activation, choice_bias_N
        self.hidden_size = router.num_inputs
        here = [expert for expert in experts if expert is not None]
        ffn_size = here[0].down.num_inputs
        up_size = ffn_size * (2 if activation.has_gate else 1)
        if len({expert.down.weight.num_slices for expert in here}) > 1:
            raise ValueError("experts whose second layers have other numbers of slices")
        for expert in here:
            up, down = expert.up, expert.down
            sizes = (up.num_inputs, up.num_outputs, down.num_inputs, down.num_outputs)
            if sizes != (self.hidden_size, up_size, ffn_size, self.hidden_size):
                raise ValueError(f"an expert of {sizes} for {self.hidden_size} inputs and a width of {ffn_size}")
        if router.num_outputs != len(experts) or not 0 < options.num_chosen <= len(experts):
            raise ValueError(f"a router of {router.num_outputs} that chooses {options.num_chosen} of {len(experts)}")
        if choice_bias_N is not None and (choice_bias_N.dtype, choice_bias_N.shape) != (torch.float32, (len(experts),)):
            raise ValueError(f"a bias {choice_bias_N.dtype} {tuple(choice_bias_N.shape)} for {len(experts)} experts")
        self._table = (_Expert * len(experts))()
        for row, expert in zip(self._table, experts, strict=True):
            if expert is not None:
                row.up, row.down = expert.up.weight, expert.down.weight
                row.down.bias = None if expert.down_bias_C is None else expert.down_bias_C.data_ptr()
        self.struct = _Layer(
            _Router(
                weight=router.weight,
                choice_bias=None if choice_bias_N is None else choice_bias_N.data_ptr(),
                num_experts=len(experts),
                adds_biases=adds_biases,
                **{name: getattr(options, name) for name in RouterOptions.__slots__},
            ),
            ctypes.addressof(self._table),
            ffn_size,
            activation.struct,
        )

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        """Raises ValueError for another dtype or size."""
        return self._sum(hidden_TC, torch.bfloat16)

    def sums(self, hidden_TC: Tensor) -> Tensor:
        """The same in fp32, for the sums of other ranks to be added to."""
        return self._sum(hidden_TC, torch.float32)

    def _sum(self, hidden_TC: Tensor, dtype: torch.dtype) -> Tensor:
        if hidden_TC.dtype != torch.bfloat16 or hidden_TC.shape[1:] != (self.hidden_size,):
            raise ValueError(f"hidden states {hidden_TC.dtype} {tuple(hidden_TC.shape)} for size {self.hidden_size}")
        hidden_TC = hidden_TC.contiguous()
        out_TC = torch.empty_like(hidden_TC, dtype=dtype)
        call = _Call(
            gomp_parallel_address(),
            torch.get_num_threads(),
            *hidden_TC.shape,
            ctypes.addressof(self.struct),
            hidden_TC.data_ptr(),
            **{"out" if dtype == torch.bfloat16 else "wide_out": out_TC.data_ptr()},
        )
        if self._run(ctypes.byref(call)):
            raise MemoryError("the library could not allocate its working memory")
        return out_TC
