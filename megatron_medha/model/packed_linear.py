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
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.sliced_linear import ColumnSlices, RowSlices
from megatron_medha.kernels.native_build import NativeUnavailable, native_library, native_target
from megatron_medha.model.narrow_weights import int4_linear, int8_linear
from megatron_medha.parallel.tp_all_reduce import tree_all_reduce

log = logging.getLogger(__name__)

MakeLinear = Callable[..., Callable[[Tensor], Tensor]]  # of a weight [O, I] and a bias [O] or None


def pack_linears(
    model: torch.nn.Module,
    sum_over_tp: Callable[[Tensor], object] | None = None,
    *,
    weight_dtype: str = "auto",
    linear_backend: str = "auto",
    keeps_weights: bool = False,
    virtual_tp: int = 1,
) -> None:
    """Replace the forward of every parallel linear layer by one over packed weights; inference only, for good.

    The row-major weights are given up, or the model would be in memory twice; only a tied output layer on the stage
    of its embedding keeps them, as the embedding reads its rows. Tensor-parallel layers communicate where Megatron's
    own do. Does nothing where it cannot help: other devices, a torch without the operators.
    sum_over_tp: what sums a row-parallel layer's output over its ranks, in place; None: the group's all-reduce.
    weight_dtype: int8 or int4: a bf16 model's are rounded to that, with int4 its output layer's to int8; whether that
    can be had, check_weight_dtype has said.
    keeps_weights: for training, which goes on with them.
    virtual_tp: slices that row-parallel layers are cut into over all ranks (virtual_tp.py); 1: none.
    Raises ConfigError for a linear_backend that cannot be had, also not in slices.
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
    if virtual_tp > 1 and (make is None or make is OneDnnLinear and dtype != torch.float32):
        kernels = "native" if dtype == torch.bfloat16 else "packed"
        raise ConfigError(
            f"model.virtual_tp={virtual_tp}: needs {kernels} linear layers in {_name_of(dtype)}, which cannot "
            f"be had here or are not wanted (model.linear_backend={linear_backend}); "
            "use model.virtual_tp=1, with other bits over parallel.tp"
        )
    if make is None:
        return
    log.log(
        logging.DEBUG if keeps_weights else logging.INFO,
        "linear_layers kernel=%s dtype=%s weights=%d virtual_tp=%d",
        "onednn" if make is OneDnnLinear else f"native instructions={native_target().lower()}",
        weight_dtype if rounding is not None else _name_of(dtype),
        sum(weight.numel() for _, weight in layers),
        virtual_tp,
    )
    for module, weight in layers:
        make_this, across_ranks, sum_sums = make, None, None
        tp, is_row = get_pg_size(module.tp_group), isinstance(module, RowParallelLinear)
        if make is int4_linear and module is getattr(model, "output_layer", None):
            make_this = int8_linear  # its errors are those of the logits themselves
        bias, returned_bias = (
            (None, module.bias) if _is_bias_returned(module, make, virtual_tp) else (module.bias, None)
        )
        if tp > 1 and not is_row:
            across_ranks = _gathering(module)
        elif tp > 1:
            assert module.input_is_parallel, "a row-parallel layer this was not written for"
            sum_ = sum_over_tp or partial(tree_all_reduce, module.tp_group)
            if module.explicit_expert_comm:  # the experts' layer sums
                pass
            elif virtual_tp > 1:
                sum_sums = sum_
            else:
                across_ranks = _summing(sum_, bias)
                bias = None  # once, not once a rank
            if make is int8_linear:
                make_this = partial(int8_linear, group=module.tp_group)
        if virtual_tp > 1:
            make_this = sliced(make_this, module, virtual_tp)
        module.forward = PackedLinear(  # type: ignore[method-assign]
            make_this, weight, bias, across_ranks, returned_bias, sum_sums
        )
        if module.weight is not None and not keeps_weights:
            weight.data = weight.data.new_empty(0)


def _is_bias_returned(
    module: ColumnParallelLinear | RowParallelLinear, make: MakeLinear, virtual_tp: int
) -> bool:
    """Whether Megatron adds it itself. A native layer adds it before it rounds, wherever the sum is the same."""
    if make is OneDnnLinear or not module.skip_bias_add:
        return bool(module.skip_bias_add)
    # Otherwise of the ranks' sum, or weighted by an expert's probability. With slices that sum is rounded afterwards.
    is_part = get_pg_size(module.tp_group) > 1 and virtual_tp == 1
    return isinstance(module, RowParallelLinear) and (is_part or module.is_expert)


def sliced(make: MakeLinear, module: ColumnParallelLinear | RowParallelLinear, virtual_tp: int) -> MakeLinear:
    """Of layers whose bits are the same on any share of the slices. Native ones need that for their inputs alone."""
    num_slices = virtual_tp // get_pg_size(module.tp_group)
    if isinstance(module, RowParallelLinear):
        return partial(RowSlices, make, num_slices) if make is OneDnnLinear else partial(make, num_slices=num_slices)
    if make is not OneDnnLinear:
        return make
    return partial(ColumnSlices, make, -(-module.output_size_per_partition // num_slices))


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
            return f"native {native_target().lower()}" if isinstance(packed.multiply, NativeLinear) else "onednn"
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
        sum_over_tp: Callable[[Tensor], object] | None = None,
    ) -> None:
        """The weight is copied.

        across_ranks: what tensor-parallel ranks do with their outputs; None: there is one rank, or the caller does it.
        returned_bias_O: returned with the output instead of added to it. sum_over_tp: what sums the ranks' sums of
        slices in place, before these are rounded; None: there are none, or one rank, or the caller does it.
        """
        self.multiply: Any = make(weight_OI.detach(), None if bias_O is None else bias_O.detach())
        self._across_ranks, self._sum_over_tp = across_ranks, sum_over_tp
        self.returned_bias_O = returned_bias_O

    @property
    def is_whole(self) -> bool:
        """Whether no other rank has a part in it."""
        return self._across_ranks is None and self._sum_over_tp is None

    def __call__(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., I] -> ([..., O], a bias that is not added). The weight, which Megatron may pass, is settled already."""
        if self._sum_over_tp is not None:
            sums = self.multiply.sums(input_)
            self._sum_over_tp(sums)
            return self.multiply.finished(sums), self.returned_bias_O
        output = self.multiply(input_)
        if self._across_ranks is not None:
            output = self._across_ranks(output, runtime_gather_output)
        return output, self.returned_bias_O


# oneDNN (3.12) adds up a lone row of more inputs in another order than rows beside others; up to here in the same.
_MAX_LONE_INPUTS = 1024


class OneDnnLinear:
    """A layer over a weight in oneDNN's own layout; in fp32 a row has the same bits whatever rows are beside it."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """The weight is copied."""
        self._bias_O = bias_O
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        self._has_lone_rows = weight_OI.shape[1] <= _MAX_LONE_INPUTS

    def __call__(self, input_: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if not self._has_lone_rows and input_.numel() == input_.shape[-1]:
            twice = input_.reshape(1, -1).expand(2, -1).contiguous()
            return self._multiply(twice)[0].view(*input_.shape[:-1], -1)
        return self._multiply(input_)

    def _multiply(self, input_: Tensor) -> Tensor:
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
