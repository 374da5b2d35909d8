"""Partial attention between the kvp ranks that share requests: one message each way per peer and layer.

Shapes: T query tokens of the shared chunks, H query heads of this rank, D head dim, R kvp ranks of a group of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class RankSet(NamedTuple):
    """Consecutive rows that the same kvp ranks attend to together."""

    kvp_ranks: tuple[int, ...]  # ascending
    first_row: int              # of the shared rows
    num_rows: int


class KVExchange:
    """The exchanges of one batch; every layer begins one. All ranks of a set call with the same rows."""

    def __init__(self, group: dist.ProcessGroup, sets: Sequence[RankSet]) -> None:
        """group: of the ranks that differ in their kvp index only. sets: of the batch, the same order on every rank."""
        self._group = group
        self._rank = group.rank()
        self.sets = tuple(sets)
        self._peers = sorted({rank for found in sets for rank in found.kvp_ranks} - {self._rank})
        self._num_rows = sum(found.num_rows for found in sets)

    def begin(self, out_THD: Tensor, lse_TH: Tensor) -> PartsOnTheirWay:
        """Post this rank's partial attention to every peer, and room for theirs; does not wait."""
        assert len(out_THD) == self._num_rows, f"{len(out_THD)} rows for an exchange of {self._num_rows}"
        packed_THE = pack(out_THD, lse_TH)
        works: list[dist.Work | None] = []
        leaving: list[Tensor] = []
        arriving: dict[int, Tensor] = {}
        # All are posted before any is waited for, so the order in which peers get to theirs does not matter.
        for peer in self._peers:
            rows = [found for found in self.sets if peer in found.kvp_ranks]
            if len(rows) == len(self.sets):
                part_THE = packed_THE
            else:
                part_THE = torch.cat([packed_THE[s.first_row : s.first_row + s.num_rows] for s in rows])
            arriving[peer] = torch.empty_like(part_THE)
            works.append(dist.irecv(arriving[peer], group=self._group, group_src=peer))
            works.append(dist.isend(part_THE, group=self._group, group_dst=peer))
            leaving.append(part_THE)
        return PartsOnTheirWay(self, packed_THE, out_THD.shape[-1], works, leaving, arriving)

    @property
    def rank(self) -> int:
        """This rank's kvp index."""
        return self._rank


class PartsOnTheirWay:
    """One layer's exchange between its beginning and its end."""

    def __init__(
        self,
        exchange: KVExchange,
        own_THE: Tensor,
        head_dim: int,
        works: Sequence[dist.Work | None],
        leaving: Sequence[Tensor],
        arriving: dict[int, Tensor],
    ) -> None:
        self._exchange, self._own_THE, self._head_dim = exchange, own_THE, head_dim
        self._works, self._arriving = works, arriving
        self._leaving = leaving  # only kept from being freed while they are on their way

    def wait(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each rank set, every rank's (out_THD, lse_TH) in ascending order of ranks: the same on all of them."""
        for work in self._works:
            assert work is not None, "this rank is of its own kvp group"
            work.wait()
        found: list[list[tuple[Tensor, Tensor]]] = []
        num_read = dict.fromkeys(self._arriving, 0)
        for ranks, first_row, num_rows in self._exchange.sets:
            parts = []
            for rank in ranks:
                if rank == self._exchange.rank:
                    part_THE = self._own_THE[first_row : first_row + num_rows]
                else:
                    row = num_read[rank]
                    part_THE = self._arriving[rank][row : row + num_rows]
                    num_read[rank] += num_rows
                parts.append(unpack(part_THE, self._head_dim))
            found.append(parts)
        return found


def pack(out_THD: Tensor, lse_TH: Tensor) -> Tensor:
    """Output and fp32 log-sum-exp in one contiguous tensor of the output's dtype, bit for bit."""
    return torch.cat((out_THD, lse_TH.contiguous()[..., None].view(out_THD.dtype)), dim=-1)


def unpack(packed_THE: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """What `pack` was given."""
    lse_TH = packed_THE[..., head_dim:].contiguous().view(torch.float32).squeeze(-1)
    return packed_THE[..., :head_dim], lse_TH
