"""What an attention backend is, and the one function that chooses it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.native_build import NativeUnavailable

log = logging.getLogger(__name__)










def backend_names(device: torch.device) -> tuple[str, ...]:
    """The backends that run on such a device, the best first."""
    if device.type != "cuda":
        rehearsed = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
        return {"cpu": ("native", "aten", *rehearsed)}.get(device.type, ())
    return (*(package for package in ("triton", "flash_attn") if find_spec(package)), "torch")


def attention_backend(name: str, device: torch.device, group: int = 1) -> AttentionBackend:
    """The backend called `name`; "auto" takes the best one for the device that can be had, and logs which and why.

    group: query heads per key/value head.

    Raises ValueError for a name nobody answers to on this device, or one that cannot be had on this machine.
    """
    names = backend_names(device)
    if name == "auto" and names:
        return _best(names, device, group)
    if name not in names:
        known = ", ".join(["auto", *names]) if names else "none for this device yet"
        raise ValueError(f"attention_backend={name} does not exist for device {device.type}; known: {known}")
    try:
        return _made(name, device, group)
    except NativeUnavailable as error:
        raise ValueError(f"attention_backend={name} cannot be had here: {error}; use attention_backend=auto") from error


def _best(names: Sequence[str], device: torch.device, group: int) -> AttentionBackend:
    for name in names:
        try:
            backend = _made(name, device, group)
        except NativeUnavailable as error:
            log.warning("attention_backend_unavailable name=%s reason=%s", name, error)
            continue
        log.info("attention_backend name=%s", name)
        return backend
    raise AssertionError("the last backend of a device can always be had")


def _made(name: str, device: torch.device, group: int) -> AttentionBackend:
    match name:
        case "native":
            from megatron_medha.kernels.attention.native_attention import NativeAttention

            return NativeAttention()
        case "aten":
            from megatron_medha.kernels.attention.cpu_attention import CpuAttention

            return CpuAttention()
        case "triton":
            from megatron_medha.kernels.triton.triton_backend import TritonAttention

            return TritonAttention(device, group=group)
        case "flash_attn" | "torch":
            from megatron_medha.kernels.attention.flash_backend import FlashAttention

            return FlashAttention(device, library=name)
        case _:
            raise AssertionError(f"backend {name} is named but not made")
