"""Partial attention between the kvp ranks that share requests: one message each way per peer and layer.

For backends that give a shard's normalised output; native ones exchange results that keep all bits (node_exchange.py).

Shapes: T query tokens of the shared chunks, H query heads of this rank, D head dim, R kvp ranks of a group of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medha.parallel.node_exchange import post_messages
from megatron_medha.parallel.shm_channel import SLOT_BYTES, ShmChannel

_GAP_BYTES = 8  # at most, between output and log-sum-exp in a slot


class RankSet(NamedTuple):
    """Consecutive rows that the same kvp ranks attend to together."""

    kvp_ranks: tuple[int, ...]  # ascending
    first_row: int              # of the shared rows
    num_rows: int


class PartialAttention(NamedTuple):
    """Attention over one rank's shard."""

    out_THD: Tensor
    lse_TH: Tensor  # fp32

    def rows(self, first_row: int, num_rows: int) -> PartialAttention:
        """Of some query tokens."""
        if num_rows == len(self.out_THD):  # the common case, once a layer
            return self
        return PartialAttention(*(x[first_row : first_row + num_rows] for x in self))


class KVExchange:
    """The exchanges of one batch; every layer begins one. All ranks of a set call with the same rows."""

    def __init__(
        self, group: dist.ProcessGroup, sets: Sequence[RankSet], shared_slots: ShmChannel | None = None
    ) -> None:
        """group: of the ranks that differ in their kvp index only. sets: of the batch, the same order on every rank.

        shared_slots: of the same group; small messages take that way.
        """
        self._group = group
        self.rank = group.rank()  # the kvp index
        self._slots = shared_slots
        self.sets = tuple(sets)
        peers = sorted({rank for found in sets for rank in found.kvp_ranks} - {self.rank})
        assert all(0 <= peer < group.size() for peer in peers), f"kvp ranks {peers} of {group.size()}"
        self._sets_of = {peer: [found for found in sets if peer in found.kvp_ranks] for peer in peers}
        self._num_rows = sum(found.num_rows for found in sets)

    def begin(self, out_THD: Tensor, lse_TH: Tensor) -> Callable[[], list[list[PartialAttention]]]:
        """Give this rank's partial attention to every peer, and make room for theirs; does not wait.

        What is returned waits. It returns, for each rank set, every rank's part in ascending order of ranks: the same
        on all of them, to be read before the next exchange begins.
        """
        assert len(out_THD) == self._num_rows, f"{len(out_THD)} rows for an exchange of {self._num_rows}"
        own = PartialAttention(out_THD, lse_TH)
        arriving: dict[int, Callable[[], PartialAttention]] = {}
        beyond_slots: dict[int, PartialAttention] = {}
        # All are posted before any is waited for, so the order in which peers get to theirs does not matter.
        for peer, sets in self._sets_of.items():
            leaving = own
            if len(sets) < len(self.sets):
                leaving = PartialAttention(
                    *map(torch.cat, zip(*(own.rows(s.first_row, s.num_rows) for s in sets), strict=True))
                )
            # As much comes back, so both ends choose the same way.
            is_small = self._slots is not None and _num_bytes(leaving) <= SLOT_BYTES
            if is_small:
                arriving[peer] = self._through_slots(peer, leaving)
            else:
                beyond_slots[peer] = leaving
        if beyond_slots:
            arriving |= self._through_group(beyond_slots)
        return partial(self._parts, own, arriving)

    def _parts(
        self, own: PartialAttention, arriving: dict[int, Callable[[], PartialAttention]]
    ) -> list[list[PartialAttention]]:
        arrived = {self.rank: own} | {peer: wait() for peer, wait in arriving.items()}
        num_read = dict.fromkeys(arrived, 0)
        found: list[list[PartialAttention]] = []
        for ranks, first_row, num_rows in self.sets:
            num_read[self.rank] = first_row  # a peer's rows are those of its own sets alone
            found.append([arrived[rank].rows(num_read[rank], num_rows) for rank in ranks])
            for rank in ranks:
                num_read[rank] += num_rows
        return found

    def _through_slots(self, peer: int, leaving: PartialAttention) -> Callable[[], PartialAttention]:
        slots = self._slots
        assert slots is not None
        number = slots.next_number(peer)
        out_THD, lse_TH = leaving
        ours, theirs = _slot_parts(slots, peer, number % 2, out_THD.dtype, out_THD.shape, lse_TH.shape)
        ours.out_THD.copy_(out_THD)
        ours.lse_TH.copy_(lse_TH)
        slots.send(peer)

        def wait() -> PartialAttention:
            slots.wait(peer, number)
            return theirs

        return wait

    def _through_group(self, leaving: dict[int, PartialAttention]) -> dict[int, Callable[[], PartialAttention]]:
        messages = {}
        for peer, part in leaving.items():
            leaving_THE = pack(*part)
            messages[peer] = (leaving_THE, torch.empty_like(leaving_THE))
        wait_for_all = post_messages(self._group, messages)

        def wait(peer: int) -> PartialAttention:
            wait_for_all()
            return unpack(messages[peer][1], leaving[peer].out_THD.shape[-1])

        return {peer: partial(wait, peer) for peer in leaving}


def pack(out_THD: Tensor, lse_TH: Tensor) -> Tensor:
    """Output and fp32 log-sum-exp in one contiguous tensor of the output's dtype, bit for bit."""
    return torch.cat((out_THD, lse_TH.contiguous()[..., None].view(out_THD.dtype)), dim=-1)


def unpack(packed_THE: Tensor, head_dim: int) -> PartialAttention:
    """What `pack` was given."""
    lse_TH = packed_THE[..., head_dim:].contiguous().view(torch.float32).squeeze(-1)
    return PartialAttention(packed_THE[..., :head_dim], lse_TH)


def _num_bytes(part: PartialAttention) -> int:
    return part.out_THD.nbytes + part.lse_TH.nbytes + _GAP_BYTES


@lru_cache(maxsize=256)
def _slot_parts(
    slots: ShmChannel, peer: int, slot: int, dtype: torch.dtype, out_shape: torch.Size, lse_shape: torch.Size
) -> tuple[PartialAttention, PartialAttention]:
    """What goes to a peer through a slot, and what comes from it; making views costs more than all the rest."""
    ours, theirs = slots.slots(peer, slot)
    return _laid_out(ours, dtype, out_shape, lse_shape), _laid_out(theirs, dtype, out_shape, lse_shape)


def _laid_out(slot: Tensor, dtype: torch.dtype, out_shape: torch.Size, lse_shape: torch.Size) -> PartialAttention:
    """A part of these shapes in the bytes of a slot."""
    num_bytes = out_shape.numel() * dtype.itemsize
    first = -(-num_bytes // 8) * 8  # fp32 is aligned
    return PartialAttention(
        slot[:num_bytes].view(dtype).view(out_shape),
        slot[first : first + 4 * lse_shape.numel()].view(torch.float32).view(lse_shape),
    )
