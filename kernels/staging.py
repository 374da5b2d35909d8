"""Small host arrays on their way to a device: all of a step's in one pinned, asynchronous copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16      # bytes; kernels load vectors, and Triton specialises on it
_NUM_BUFFERS = 4     # steps that may be on their way at once before one is waited for
_MIN_BYTES = 1 << 16


def packed_offsets(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these sizes begin when laid end to end, aligned; and the bytes in all."""
    offsets, end = [], 0
    for size in sizes_bytes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class Staging:
    """Copies arrays to one device. On a CPU it hands out the arrays themselves.

    Pinned buffers are used in turn; an event keeps a buffer from being filled while its last copy is under way, so
    the host never waits unless it is several steps ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._copied: list[torch.cuda.Event] = []
        self._next = 0

    def upload(self, arrays: Sequence[np.ndarray], into: Tensor | None = None) -> list[Tensor]:
        """The arrays as tensors on the device, in order; `into`: a uint8 buffer there to lay them out in.

        The tensors share one buffer. They are valid for work enqueued on the current stream after this call.
        """
        if self._device.type == "cpu" and into is None:
            return [torch.from_numpy(array) for array in arrays]
        offsets, num_bytes = packed_offsets([array.nbytes for array in arrays])
        staged = self._pinned(num_bytes)
        host = staged.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if into is None:
            into = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        assert into.numel() >= num_bytes, f"{num_bytes} bytes for a buffer of {into.numel()}"
        into[:num_bytes].copy_(staged[:num_bytes], non_blocking=True)
        if self._device.type == "cuda":
            self._copied[self._next].record()
            self._next = (self._next + 1) % _NUM_BUFFERS
        return views_of(into, [(array.shape, array.dtype) for array in arrays])

    def _pinned(self, num_bytes: int) -> Tensor:
        if self._device.type != "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8)
        if not self._buffers:
            self._buffers = [torch.empty(_MIN_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_BUFFERS)]
            self._copied = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)]
        self._copied[self._next].synchronize()
        if self._buffers[self._next].numel() < num_bytes:
            self._buffers[self._next] = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._buffers[self._next]


def views_of(buffer: Tensor, layout: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[Tensor]:
    """The tensors of a uint8 buffer that was packed with arrays of these shapes and dtypes."""
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout]
    offsets, _ = packed_offsets(sizes)
    return [
        buffer[offset : offset + size].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)
        for (shape, dtype), offset, size in zip(layout, offsets, sizes, strict=True)
    ]
