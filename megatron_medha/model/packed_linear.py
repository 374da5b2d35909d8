"""Linear layers whose weights lie in the layout their kernel reads: the CPU path of inference.

fp32: oneDNN's own layout. Against F.linear on the row-major weight, one thread, 3072 x 512, 1 to 32 tokens: 1.5 to 2.5
times faster, and not slower at 512 tokens. bf16: the native layers of native_linear.py wherever there are any, with
int8 or int4 weights if asked for. The choice follows from options and instruction set alone: a choice by timing would
change the bits of completions from one start to the next. What it is measured against: experiments/cpu_kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.native_build import NativeUnavailable, native_library, native_target
from megatron_medha.model.narrow_weights import int4_linear, int8_linear

log = logging.getLogger(__name__)

MakeLinear = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]

def pack_linears(
    model: torch.nn.Module,
    sum_over_tp: Callable[[Tensor], object] | None = None,
    *,
    weight_dtype: str = "auto",
    linear_backend: str = "auto",
    keeps_weights: bool = False,
) -> None:
    """Replace the forward of every parallel linear layer by one over packed weights; inference only, for good.

    The row-major weights are given up, or the model would be in memory twice; only a tied output layer on the stage
    of its embedding keeps them, as the embedding reads its rows. Tensor-parallel layers communicate where Megatron's
    own do. Does nothing where it cannot help: other devices, a torch without the operators.
    sum_over_tp: what sums a row-parallel layer's output over its ranks, in place; None: the group's all-reduce.
    weight_dtype: int8 or int4: a bf16 model's are rounded to that, with int4 its output layer's to int8; whether that
    can be had, check_weight_dtype has said.
    keeps_weights: for training, which goes on with them.
    Raises ConfigError for a linear_backend that cannot be had.
    """
    shared_weight: Tensor | None = None
    if getattr(model, "share_embeddings_and_output_weights", False):  # of a whole model
        shared_weight = model.shared_embedding_or_output_weight()  # type: ignore[operator]
    layers = []
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        if "forward" in vars(module):  # quantised already
            continue
        weight = module.weight if module.weight is not None else shared_weight
        if weight is not None and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
            layers.append((module, weight))
    if not layers:
        return
    dtype = layers[0][1].dtype
    rounding = {"int8": int8_linear, "int4": int4_linear}.get(weight_dtype)
    make = rounding or linear_kernel(linear_backend, dtype)
    if make is None:
        return
    log.log(
        logging.DEBUG if keeps_weights else logging.INFO,
        "linear_layers kernel=%s dtype=%s weights=%d",
        "onednn" if make is OneDnnLinear else f"native instructions={native_target().lower()}",
        weight_dtype if rounding is not None else _name_of(dtype),
        sum(weight.numel() for _, weight in layers),
    )
    for module, weight in layers:
        make_this, across_ranks = make, None
        if make is int4_linear and module is getattr(model, "output_layer", None):
            make_this = int8_linear  # its errors are those of the logits themselves
        bias, returned_bias = (None, module.bias) if _is_bias_returned(module, make) else (module.bias, None)
        if get_pg_size(module.tp_group) > 1 and isinstance(module, ColumnParallelLinear):
            across_ranks = _gathering(module)
        elif get_pg_size(module.tp_group) > 1:
            assert module.input_is_parallel, "a row-parallel layer this was not written for"
            if not module.explicit_expert_comm:  # the experts' dispatcher sums
                across_ranks = _summing(sum_over_tp or partial(dist.all_reduce, group=module.tp_group), bias)
                bias = None  # once, not once a rank
            if make is int8_linear:
                make_this = partial(int8_linear, group=module.tp_group)
        module.forward = PackedLinear(  # type: ignore[method-assign]
            make_this, weight, bias, across_ranks, returned_bias
        )
        if module.weight is not None and not keeps_weights:
            weight.data = weight.data.new_empty(0)


def _is_bias_returned(module: ColumnParallelLinear | RowParallelLinear, make: MakeLinear) -> bool:
    """Whether Megatron adds it itself. A native layer adds it before it rounds, wherever the sum is the same."""
    if make is OneDnnLinear or not module.skip_bias_add:
        return bool(module.skip_bias_add)
    # Otherwise of the ranks' sum, or weighted by an expert's probability.
    return isinstance(module, RowParallelLinear) and (get_pg_size(module.tp_group) > 1 or module.is_expert)


def linear_kernel(name: str, dtype: torch.dtype) -> MakeLinear | None:
    """The kernel for weights of that dtype; None: no packed one is to be had.

    auto: native for bf16 where the library can be had, else oneDNN. Raises ConfigError for another name that cannot be.
    """
    if name == "native" and dtype != torch.bfloat16:
        raise ConfigError(f"model.linear_backend=native: needs model.dtype=bfloat16, not {_name_of(dtype)}; use auto")
    if name != "onednn" and dtype == torch.bfloat16:
        try:
            native_library()
            return NativeLinear
        except NativeUnavailable as error:
            if name == "native":
                raise ConfigError(f"model.linear_backend=native: cannot be had here: {error}; use auto") from error
            log.warning("native_linear_unavailable reason=%s", error)
    if _operators_exist():
        return OneDnnLinear
    if name == "onednn":
        raise ConfigError("model.linear_backend=onednn: this torch has no packed linear layers; use auto")
    return None


def linear_kernels_of(model: GPTModel) -> str:
    """Which kernels multiply in this model, to compare bits by; "" where they are torch's own."""
    for module in model.modules():
        if isinstance(packed := vars(module).get("forward"), PackedLinear):
            return "onednn" if isinstance(packed.multiply, OneDnnLinear) else f"native {native_target().lower()}"
    return ""


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PackedLinear:
    """Stands in for the forward of one of Megatron's parallel linear layers."""

    def __init__(
        self,
        make: MakeLinear,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        across_ranks: Callable[[Tensor, bool | None], Tensor] | None = None,
        returned_bias_O: Tensor | None = None,
    ) -> None:
        """The weight is copied.

        across_ranks: what tensor-parallel ranks do with their outputs; None: there is one rank, or the caller does it.
        returned_bias_O: returned with the output instead of added to it.
        """
        self.multiply = make(weight_OI.detach(), None if bias_O is None else bias_O.detach())
        self._across_ranks = across_ranks
        self.returned_bias_O = returned_bias_O

    @property
    def is_whole(self) -> bool:
        """Whether no other rank has a part in it."""
        return self._across_ranks is None

    def __call__(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., I] -> ([..., O], a bias that is not added). The weight, which Megatron may pass, is settled already."""
        output = self.multiply(input_)
        if self._across_ranks is not None:
            output = self._across_ranks(output, runtime_gather_output)
        return output, self.returned_bias_O


class OneDnnLinear:
    """A layer over a weight in oneDNN's own layout."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """The weight is copied."""
        self._bias_O = bias_O
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)

    def __call__(self, input_: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return torch.ops.mkldnn._linear_pointwise(input_, self._packed, self._bias_O, "none", [], "")


def _gathering(layer: ColumnParallelLinear) -> Callable[[Tensor, bool | None], Tensor]:
    """Every rank's outputs, where Megatron would gather them."""

    def gathered(output: Tensor, is_gathered: bool | None) -> Tensor:
        if not (layer.gather_output if is_gathered is None else is_gathered):
            return output
        return gather_from_tensor_model_parallel_region(output, group=layer.tp_group)

    return gathered


def _summing(
    sum_over_tp: Callable[[Tensor], object], bias_O: Tensor | None
) -> Callable[[Tensor, bool | None], Tensor]:
    """The sum of every rank's outputs, and the bias."""

    def summed(output: Tensor, _: bool | None) -> Tensor:
        sum_over_tp(output)
        return output if bias_O is None else output.add_(bias_O)

    return summed


def _operators_exist() -> bool:
    """Tried rather than looked up: they are torch.compile's own, without a promise to stay as they are."""
    try:
        weight_OI = torch.eye(16)
        return torch.equal(OneDnnLinear(weight_OI, None)(weight_OI), F.linear(weight_OI, weight_OI))
    except (AttributeError, RuntimeError, TypeError):
        return False
