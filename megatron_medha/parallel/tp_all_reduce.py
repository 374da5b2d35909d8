"""The sum over tensor-parallel ranks that ends every attention and MLP: through shared memory when it is small.

On a CPU it is one binary tree over the ranks, at every size: the same bits on all of them, for a chunk of any length,
and with slices (models/virtual_tp.py) at any number of ranks.

DeepSpeed has such a sum for CPU ranks (inference_all_reduce of deepspeed.comm, 0.19.8). It is not used: it is compiled
at the first start on every machine, half a minute of g++; it sums over all ranks, whatever group it is given; and while
it waits for a peer it keeps its core, which took twice as long as gloo with four ranks on two cores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medha.parallel.shm_channel import SLOT_BYTES, ShmChannel

log = logging.getLogger(__name__)


def tp_all_reduce(group: dist.ProcessGroup, device: torch.device) -> Callable[[Tensor], object]:
    """What sums a tensor over the group's ranks, in place. Collective, and so is each call of it."""
    if device.type != "cpu":
        return partial(dist.all_reduce, group=group)
    slots = ShmChannel.open(group, device)
    if slots is None:
        return partial(tree_all_reduce, group)
    log.info("tp_all_reduce shared_memory_max_bytes=%d fallback=%s", SLOT_BYTES, dist.get_backend(group))
    return ShmAllReduce(group, slots)


def tree_all_reduce(group: dist.ProcessGroup, tensor: Tensor) -> None:
    """Sum in place over a group's ranks, on a CPU as tree_sum_ does. Collective."""
    if group.size() <= 2 or tensor.device.type != "cpu":  # two numbers have one sum
        dist.all_reduce(tensor, group=group)
        return
    # Each rank adds up a share of the numbers; shares are equal, so the last one is filled up.
    share = -(-tensor.numel() // group.size())
    padded = tensor.new_zeros(group.size() * share)
    padded[: tensor.numel()] = tensor.flatten()
    arrived = torch.empty_like(padded)
    dist.all_to_all_single(arrived, padded, group=group)
    dist.all_gather_into_tensor(padded, tree_sum_(list(arrived.chunk(group.size()))), group=group)
    tensor.copy_(padded[: tensor.numel()].view_as(tensor))


def tree_sum_(summands: Sequence[Tensor]) -> Tensor:
    """Of neighbours, then of neighbouring sums, and so on; an odd one goes on by itself. All may be overwritten."""
    while len(summands) > 1:
        sums = [low.add_(high) for low, high in zip(summands[::2], summands[1::2], strict=False)]
        summands = sums + list(summands[len(sums) * 2 :])
    return summands[0]


class ShmAllReduce:
    """Every rank writes its summand for every other, and adds up what has come as tree_sum_ does: the same bits.

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
            tree_all_reduce(self._group, tensor)
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
        total = tree_sum_(summands)  # what has come is read once, so it may be overwritten
        if total is not tensor:
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
