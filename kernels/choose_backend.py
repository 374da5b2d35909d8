"""The choice of an attention backend."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec

import torch

from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.backend_table import BACKENDS, REHEARSED, is_rehearsal
from megatron_medha.kernels.native_build import NativeUnavailable

log = logging.getLogger(__name__)


def backend_names(device: torch.device) -> tuple[str, ...]:
    """The backends that run on such a device, the best first."""
    found = [name for name, entry in BACKENDS.items() if all(find_spec(package) for package in entry.packages)]
    names = tuple(name for name in found if BACKENDS[name].device == device.type)
    is_rehearsed = device.type == "cpu" and is_rehearsal()
    return names + tuple(name for name in found if name in REHEARSED) if is_rehearsed else names


def attention_backend(
    name: str, device: torch.device, group: int = 1, score_cap: float | None = None
) -> AttentionBackend:
    """The backend called `name`; "auto" takes the best one for the device that can be had, and logs which and why.

    group: query heads per key/value head. score_cap: see AttentionBackend.

    Raises ValueError for a name nobody answers to on this device, or one that cannot be had on this machine.
    """
    names = backend_names(device)
    if name != "auto" and name not in names or not names:
        known = ", ".join(["auto", *names]) if names else "none for this device yet"
        raise ValueError(f"attention_backend={name} does not exist for device {device.type}; known: {known}")
    for candidate in names if name == "auto" else (name,):
        module, _, kind = BACKENDS[candidate].address.partition(":")
        try:
            backend: AttentionBackend = getattr(import_module(f"megatron_medha.kernels.{module}"), kind).made(
                candidate, device, group
            )
        except NativeUnavailable as error:
            if name != "auto":
                raise ValueError(
                    f"attention_backend={name} cannot be had here: {error}; use attention_backend=auto"
                ) from error
            log.warning("attention_backend_unavailable name=%s reason=%s", candidate, error)
            continue
        if score_cap is not None and not backend.caps_scores:
            continue
        backend.score_cap = score_cap
        log.info("attention_backend name=%s", candidate)
        return backend
    assert score_cap is not None, "the last backend of a device can always be had"
    raise ValueError(f"attention_backend={name}: does not cap attention's scores, as this model does; aten, triton do")
