"""The sum over tensor-parallel ranks that ends every attention and MLP: through shared memory when it is small.

DeepSpeed has such a sum for CPU ranks (inference_all_reduce of deepspeed.comm, 0.19.8). It is not used: it is compiled
at the first start on every machine, half a minute of g++; it sums over all ranks, whatever group it is given; and while
it waits for a peer it keeps its core, which took twice as long as gloo with four ranks on two cores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medha.parallel.shm_channel import SLOT_BYTES, ShmChannel

log = logging.getLogger(__name__)


def tp_all_reduce(group: dist.ProcessGroup, device: torch.device) -> Callable[[Tensor], object]:
    """What sums a tensor over the group's ranks, in place. Collective, and so is each call of it."""
    slots = ShmChannel.open(group, device)
    if slots is None:
        return partial(dist.all_reduce, group=group)
    log.info("tp_all_reduce shared_memory_max_bytes=%d fallback=%s", SLOT_BYTES, dist.get_backend(group))
    return ShmAllReduce(group, slots)


class ShmAllReduce:
    """Every rank writes its summand for every other, and adds up what has come in the order of ranks: the same bits.

    Larger tensors go through the group.
    """

    def __init__(self, group: dist.ProcessGroup, slots: ShmChannel) -> None:
        self._group, self._slots = group, slots
        self._rank = group.rank()
        self._peers = [rank for rank in range(group.size()) if rank != self._rank]
        self._views: dict[tuple[int, int, torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}  # ours, theirs

    def __call__(self, tensor: Tensor) -> None:
        """Sum over all ranks, which call it with equal shapes."""
        if tensor.numel() * tensor.element_size() > SLOT_BYTES:
            dist.all_reduce(tensor, group=self._group)
            return
        arriving: dict[int, tuple[int, Tensor]] = {}
        for peer in self._peers:
            number = self._slots.next_number(peer)
            ours, theirs = self._view(peer, number, tensor)
            ours.copy_(tensor)
            self._slots.send(peer)
            arriving[peer] = number, theirs
        summands = []
        for rank in range(len(self._peers) + 1):
            if rank == self._rank:
                summands.append(tensor)
            else:
                number, theirs = arriving[rank]
                self._slots.wait(rank, number)
                summands.append(theirs)
        total = torch.add(summands[0], summands[1])
        for summand in summands[2:]:
            total.add_(summand)
        tensor.copy_(total)

    def _view(self, peer: int, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (peer, number % 2, like.shape, like.dtype)
        if key not in self._views:
            num_bytes = like.numel() * like.element_size()
            ours, theirs = (
                slot[:num_bytes].view(like.dtype).view(like.shape) for slot in self._slots.slots(peer, number)
            )
            self._views[key] = ours, theirs
        return self._views[key]
