"""Results of attention over partitions of keys, between kvp ranks that share requests: one message each way per peer.

What a message holds is read by kernels/native/shards.cpp: fp32 results of nodes of a tree, which every rank merges in
the same order. Shapes: N results of this rank, H query heads, E numbers of a result of one head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medha.parallel.shm_channel import SLOT_BYTES, ShmChannel


class SharedResults(NamedTuple):
    """Of one chunk's rows: how many results each of its kvp ranks has."""

    kvp_ranks: tuple[int, ...]
    num_results: tuple[int, ...]

    def of(self, kvp_rank: int) -> int:
        """How many that rank has."""
        return self.num_results[self.kvp_ranks.index(kvp_rank)]


class NodeExchange:
    """The exchanges of one batch; every layer begins one. All ranks of a chunk call with the same chunks."""

    def __init__(
        self, group: dist.ProcessGroup, chunks: Sequence[SharedResults], shared_slots: ShmChannel | None = None
    ) -> None:
        """group: of the ranks that differ in their kvp index only. chunks: of the batch, the same order on every rank.

        shared_slots: of the same group; small messages take that way.
        """
        self._group = group
        self.rank = group.rank()  # the kvp index
        self._slots = shared_slots
        self._chunks = tuple(chunks)
        self._num_leaving: Counter[int] = Counter()   # results, by peer
        self._num_arriving: Counter[int] = Counter()
        for chunk in chunks:
            own = chunk.of(self.rank)
            for peer, theirs in zip(chunk.kvp_ranks, chunk.num_results, strict=True):
                if peer != self.rank:
                    self._num_leaving[peer] += own
                    self._num_arriving[peer] += theirs
        self._peers = sorted(self._num_leaving)

    @property
    def links(self) -> np.ndarray | None:
        """Of ShmChannel, for callers that exchange through shared memory without `begin`; None: there is none."""
        return None if self._slots is None else self._slots.links

    def fits_slots(self, result_bytes: int) -> bool:
        """Whether every message goes through shared memory, with so many bytes a result."""
        return all(self._fits_slot(peer, result_bytes) for peer in self._peers)

    def _fits_slot(self, peer: int, result_bytes: int) -> bool:
        # The same on both ends: one goes out for each that comes in.
        most = max(self._num_leaving[peer], self._num_arriving[peer])
        return self._slots is not None and most * result_bytes <= SLOT_BYTES

    def wait_for_slots(self) -> None:
        """Until every peer's answer to what was sent last is there. Raises TimeoutError after half an hour."""
        assert self._slots is not None
        for peer in self._peers:
            self._slots.wait(peer, self._slots.last_number(peer))

    def begin(self, nodes_NHE: Tensor) -> Callable[[], dict[int, Tensor]]:
        """Give this rank's results to every peer, and make room for theirs; does not wait.

        What is returned waits. It returns every peer's results of the chunks it shares with this rank, flat, to be read
        before the next exchange begins.
        """
        _, num_heads, width = nodes_NHE.shape
        waits: dict[int, Callable[[], Tensor]] = {}
        beyond_slots: dict[int, tuple[Tensor, Tensor]] = {}
        # All are posted before any is waited for, so the order in which peers get to theirs does not matter.
        for peer in self._peers:
            leaving = self._shared_with(peer, nodes_NHE).reshape(-1)
            num_arriving = self._num_arriving[peer] * num_heads * width
            if self._fits_slot(peer, 4 * num_heads * width):
                waits[peer] = self._through_slot(peer, leaving, num_arriving)
            else:
                beyond_slots[peer] = leaving, torch.empty(num_arriving)
        if beyond_slots:
            wait_for_all = post_messages(self._group, beyond_slots)
            waits |= {peer: partial(_waited, wait_for_all, arriving) for peer, (_, arriving) in beyond_slots.items()}
        return lambda: {peer: wait() for peer, wait in waits.items()}

    def _shared_with(self, peer: int, nodes_NHE: Tensor) -> Tensor:
        if self._num_leaving[peer] == len(nodes_NHE):
            return nodes_NHE
        found, first = [], 0
        for chunk in self._chunks:
            end = first + chunk.of(self.rank)
            if peer in chunk.kvp_ranks:
                found.append(nodes_NHE[first:end])
            first = end
        return torch.cat(found)

    def _through_slot(self, peer: int, leaving: Tensor, num_arriving: int) -> Callable[[], Tensor]:
        slots = self._slots
        assert slots is not None
        number = slots.next_number(peer)
        ours, theirs = slots.slots(peer, number)
        ours[: leaving.nbytes].view(torch.float32).copy_(leaving)
        slots.send(peer)

        def wait() -> Tensor:
            slots.wait(peer, number)
            return theirs[: 4 * num_arriving].view(torch.float32)

        return wait


def post_messages(group: dist.ProcessGroup, messages: Mapping[int, tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Send each peer a tensor and receive one of it, (leaving, arriving); what is returned waits for all.

    All at once, as NCCL runs single ones in the order they were posted: two ranks that both post their receive first
    would wait for each other for ever.
    """
    posts = []
    for peer, (leaving, arriving) in messages.items():
        posts.append(dist.P2POp(dist.irecv, arriving, group=group, group_peer=peer))
        posts.append(dist.P2POp(dist.isend, leaving, group=group, group_peer=peer))
    works = dist.batch_isend_irecv(posts)

    def wait() -> None:
        while works:
            works.pop().wait()
        _ = messages  # kept from being freed while they are on their way

    return wait


def _waited(wait: Callable[[], None], arriving: Tensor) -> Tensor:
    wait()
    return arriving
