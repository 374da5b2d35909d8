"""FP8 linear layers: Transformer Engine's by Megatron's spec, torch's scaled matmul where it is missing.

Weights are quantised once: Transformer Engine keeps the copy it makes at the first forward pass, ours are replaced at
load. The torch path is tested on CPU; Transformer Engine's has not run on a GPU yet.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_medha.core.errors import ConfigError

log = logging.getLogger(__name__)

_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_MIN_SCALE = 1e-12  # rows of zeros
# torch._scaled_mm takes dimensions of the weight that are multiples of this.
_ALIGNMENT = 16


def fp8_config(recipe: str) -> dict[str, Any]:
    """What Megatron's TransformerConfig needs for Transformer Engine's FP8; empty for recipe "none".

    Both recipes scale by what is in the tensor at hand. "delayed" scales by history, which a server that has just
    started does not have.
    """
    if recipe == "none":
        return {}
    return {
        "fp8": "e4m3",  # inference has no gradients, which alone would need e5m2
        "fp8_recipe": recipe,
        "fp8_param": False,  # checkpoints are read as bf16; quantised copies are made at the first forward pass
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
    }


def check_fp8(recipe: str, *, dtype: torch.dtype, has_transformer_engine: bool, tp: int) -> None:
    """Raises ConfigError where the recipe cannot be had."""
    if recipe == "none":
        return
    if dtype != torch.bfloat16:
        raise ConfigError(f"model.fp8={recipe}: needs model.dtype=bfloat16, not {str(dtype).removeprefix('torch.')}")
    if has_transformer_engine:
        return
    if recipe == "blockwise":
        raise ConfigError("model.fp8=blockwise: needs Transformer Engine, which is not usable here; use tensorwise")
    if tp > 1:
        raise ConfigError(f"model.fp8={recipe}: without Transformer Engine only with parallel.tp=1, not {tp}")


def quantise_linears(model: GPTModel, recipe: str, has_transformer_engine: bool) -> None:
    """Make the decoder's linear layers compute in FP8; the output layer stays as it is, as is the custom.

    Says in the log which library does it. The torch path gives up the bf16 weights.
    """
    if recipe == "none":
        return
    if has_transformer_engine:
        from megatron.core.fp8_utils import prepare_model_for_fp8_inference

        prepare_model_for_fp8_inference(model)  # pads tokens to the multiple of 16 its products need
        log.info("fp8_backend library=transformer_engine recipe=%s", recipe)
        return
    num_layers = 0
    for module in model.decoder.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        assert get_pg_size(module.tp_group) == 1, "check_fp8 lets no other pass"
        if any(size % _ALIGNMENT for size in module.weight.shape):
            shape = tuple(module.weight.shape)
            log.warning("fp8_layer_skipped shape=%s reason=not_a_multiple_of_%d", shape, _ALIGNMENT)
            continue
        is_added = not module.skip_bias_add  # else Megatron adds it, where and weighted as it must be
        scaled = ScaledLinear(module.weight, module.bias, is_bias_added=is_added)
        module.forward = scaled  # type: ignore[method-assign]
        module.weight.data = module.weight.data.new_empty(0)
        num_layers += 1
    log.warning(
        "fp8_backend library=torch_scaled_mm requested=%s scales=rowwise layers=%d reason=transformer_engine_unusable",
        recipe, num_layers,
    )  # fmt: skip


def why_fp8_fails(model: GPTModel) -> str | None:
    """Why one of the decoder's kinds of linear layer computes nothing in Transformer Engine's FP8; None: all do.

    Collective. A library that can be imported may still lack a kernel for this GPU, which shows at the first launch.
    """
    from megatron.core.fp8_utils import get_fp8_context

    seen = set()
    for module in model.decoder.modules():
        kind = (type(module), getattr(module, "in_features", None), getattr(module, "out_features", None))
        if not type(module).__name__.startswith("TE") or None in kind or kind in seen:
            continue
        seen.add(kind)
        weight = next(module.parameters())
        input_T1I = torch.ones(_ALIGNMENT, 1, module.in_features, dtype=weight.dtype, device=weight.device)
        try:
            with torch.inference_mode(), get_fp8_context(model.config, 0):
                output = module(input_T1I)
            (output[0] if isinstance(output, tuple) else output).float().sum().item()  # errors of kernels come late
        except Exception as error:  # of a library that is not ours: it raises whatever it likes
            return f"{type(module).__name__}: {type(error).__name__}: {error}"
    return None


class ScaledLinear:
    """Stands in for the forward of a Megatron linear layer: e4m3 products with a scale per token and per output.

    Scales by row are finer than a tensor's one scale and as cheap: no token waits for the largest of all.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, is_bias_added: bool = True) -> None:
        """The weight is copied, quantised. A bias that is not added is returned with the output."""
        bias_O = None if bias_O is None else bias_O.detach()
        self._bias_O = bias_O if is_bias_added else None
        self._returned_bias_O = None if is_bias_added else bias_O
        self._weight_OI, scale_O1 = quantised_rows(weight_OI.detach())
        self._scale_1O = scale_O1.t().contiguous()

    def __call__(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[..., I] bf16 -> ([..., O] bf16, a bias that is not added)."""
        input_TI, scale_T1 = quantised_rows(input_.flatten(0, -2))
        out_TO = torch._scaled_mm(
            input_TI, self._weight_OI.t(), scale_a=scale_T1, scale_b=self._scale_1O, out_dtype=input_.dtype,
            use_fast_accum=input_.is_cuda,
        )  # fmt: skip
        if self._bias_O is not None:
            out_TO = out_TO + self._bias_O
        return out_TO.unflatten(0, input_.shape[:-1]), self._returned_bias_O


def quantised_rows(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [R, C], fp32 scales [R, 1]) with x = values * scale, to e4m3's 1/16."""
    scale_R1 = (x_RC.abs().amax(dim=1, keepdim=True).float() / _E4M3_MAX).clamp_(min=_MIN_SCALE)
    return (x_RC / scale_R1).to(_E4M3), scale_R1
