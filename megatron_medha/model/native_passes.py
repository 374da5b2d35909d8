"""Puts the native RMS norm and gated SiLU into a model on the CPU, where they can be had; inference only, for good."""

from __future__ import annotations

import logging

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.kernels.linear.native_pointwise import NativePointwise
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.model.layer import MedhaTransformerLayer

log = logging.getLogger(__name__)


def use_native_passes(model: GPTModel) -> None:
    """Replace torch's; does nothing on other devices, and says so where the library cannot be had."""
    if next(model.parameters()).device.type != "cpu":
        return
    try:
        pointwise = NativePointwise()
    except NativeUnavailable as error:
        log.warning("native_passes_unavailable reason=%s", error)
        return
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.forward = NativeRMSNorm(pointwise, module)  # type: ignore[method-assign, assignment]
        elif isinstance(module, MedhaTransformerLayer):
            module.gated_silu = pointwise.gated_silu  # type: ignore[method-assign]


class NativeRMSNorm:
    """Stands in for the forward of a torch.nn.RMSNorm over the last dimension."""

    def __init__(self, pointwise: NativePointwise, norm: torch.nn.RMSNorm) -> None:
        """The weight is looked up at each call: loading may replace it."""
        self._pointwise = pointwise
        self._norm = norm
        # What torch takes where none is given.
        self._epsilon = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps

    def __call__(self, input_: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self._pointwise.rms_norm(input_, self._norm.weight, self._epsilon)
