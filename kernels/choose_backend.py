"""What an attention backend is, and the one function that chooses it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.native_build import NativeUnavailable

log = logging.getLogger(__name__)


class LayerKV(NamedTuple):
    """One layer's keys and values for all blocks of the pool; the layout is the backend's own."""

    k: Tensor
    v: Tensor


class QueryRange(NamedTuple):
    """Consecutive rows of the packed batch that belong to one sequence."""

    first_row: int
    num_rows: int
    start: int  # position of the first row in its sequence: KV for [0, start) already exists
    table: SlotTable
    # False: the rows' own keys and values belong to another rank's shard. They are not written, and the rows see
    # all of [0, start) of this table and nothing of one another.
    is_written: bool = True


class AttentionBackend(Protocol):
    """Causal attention of a packed batch over paged KV. One object serves all layers."""

    name: str
    min_run_tokens: int  # for the slot tables it is given

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerKV:
        """Uninitialised KV of one layer."""

    def plan(self, ranges: Sequence[QueryRange]) -> Any:
        """Everything about a batch that all layers share, computed once per step."""

    def attend(
        self, plan: Any, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD (H = K * G, in that order).

        A query at position p of its sequence sees positions [0, p]. Every range of the plan must be written.
        """

    def attend_with_lse(
        self, plan: Any, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence: (out_THD, lse_TH fp32, natural), to be merged with other shards'.

        A row that sees no key of this shard has lse -inf.
        """


@runtime_checkable
class RotatingBackend(Protocol):
    """A backend that also rotates queries and keys, in the pass that writes keys and values to the pool."""

    def attend_rotating(
        self,
        plan: Any,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: LayerKV,
        scale: float,
    ) -> Tensor:
        """`attend` with queries and keys still to be rotated by (cos_TD, signed_sin_TD), fp32."""


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
