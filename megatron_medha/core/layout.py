"""How ranks are numbered over the parallel axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_medha.core.errors import ConfigError


class Coord(NamedTuple):
    """A rank's place on every axis."""

    tp: int
    kvp: int
    spp: int  # index of its stage
    dp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Degrees of the four axes; tp varies fastest, then kvp, then stages (spp), then replicas (dp).

    rank = dp * (spp * kvp * tp) + spp * (kvp * tp) + kvp * tp + tp.
    """

    tp: int = 1
    spp: int = 1
    kvp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis in ("tp", "spp", "kvp", "dp"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{axis}={getattr(self, axis)} must be at least 1")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.spp * self.kvp * self.dp

    def coord_of(self, rank: int) -> Coord:
        """The place of a rank."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        rest, tp = divmod(rank, self.tp)
        rest, kvp = divmod(rest, self.kvp)
        dp, spp = divmod(rest, self.spp)
        return Coord(tp, kvp, spp, dp)

    def rank_of(self, coord: Coord) -> int:
        """The rank at a place."""
        return ((coord.dp * self.spp + coord.spp) * self.kvp + coord.kvp) * self.tp + coord.tp

    def groups(self, axis: str) -> list[list[int]]:
        """Ranks that differ on this axis only, one list per group, in rank order."""
        members: dict[Coord, list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(self.coord_of(rank)._replace(**{axis: 0}), []).append(rank)
        return list(members.values())
