"""How much of a GPU's memory KV gets: what weights, the largest step and CUDA graphs leave, measured and not guessed.

The largest step is run over a small pool of its own first. What Transformer Engine copies at the first forward pass,
cuBLAS's workspaces and NCCL's buffers are there by then, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

log = logging.getLogger(__name__)

GPU_KV_SHARE = 0.92  # unless model.kv_memory_share says otherwise; the rest is for fragments and the driver
_GIB = float(1 << 30)


class DeviceMemory(Protocol):
    """What is asked of a GPU's memory, in bytes."""

    def free(self) -> int:
        """Free on the device, for any process."""
        ...

    def allocated(self) -> int:
        """In live tensors of this process."""
        ...

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most in tensors while it ran. Afterwards what the allocator keeps beside tensors is given back."""
        ...


class CudaMemory:
    """A CUDA device's."""

    def __init__(self, device: torch.device) -> None:
        """device: its number is given."""
        self._device = device

    def free(self) -> int:
        """See DeviceMemory."""
        return torch.cuda.mem_get_info(self._device)[0]

    def allocated(self) -> int:
        """See DeviceMemory."""
        return torch.cuda.memory_allocated(self._device)

    def peak_of(self, work: Callable[[], object]) -> int:
        """See DeviceMemory."""
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.empty_cache()
        return peak


class StepPeaks(NamedTuple):
    """Bytes that steps need beside weights and KV."""

    largest: int  # the largest step, while it runs
    graphs: int   # the largest CUDA graph, for good


def measured_peaks(
    memory: DeviceMemory, run_step: Callable[[int], object], *, largest_tokens: int, graph_tokens: int
) -> StepPeaks:
    """run_step: computes a step of so many tokens. graph_tokens: of the largest CUDA graph; 0 where there is none."""
    run_step(1)  # once before: what is made at the first step stays
    before = memory.allocated()
    largest = memory.peak_of(lambda: run_step(largest_tokens)) - before
    graphs = memory.peak_of(lambda: run_step(graph_tokens)) - before if graph_tokens else 0
    return StepPeaks(largest, graphs)


def kv_bytes_beside(memory: DeviceMemory, peaks: StepPeaks, share: float) -> int:
    """That share of what steps leave of the memory that is free now."""
    free = memory.free()
    kv = int((free - peaks.largest - peaks.graphs) * share)
    log.info(
        "kv_memory free_gib=%.2f largest_step_gib=%.2f graphs_gib=%.2f share=%g kv_gib=%.2f",
        free / _GIB, peaks.largest / _GIB, peaks.graphs / _GIB, share, kv / _GIB,
    )  # fmt: skip
    return max(kv, 0)
