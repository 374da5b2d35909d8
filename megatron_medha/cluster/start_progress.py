"""How far the ranks of a replica have come up, as one value for a person to read."""

from __future__ import annotations

from megatron_medha.cluster.messages import RankLoading, RankReady


class StartProgress:
    """What all ranks have said while they start."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._seen: dict[int, list[str]] = {rank: [] for rank in range(num_ranks)}  # what each was doing, in order
        self._fractions: dict[int, float] = dict.fromkeys(range(num_ranks), 0.0)    # of what it does now
        self._ready: dict[int, RankReady] = {}

    def take(self, message: RankLoading | RankReady) -> None:
        """A rank has come further."""
        match message:
            case RankReady():
                self._ready[message.rank] = message
            case RankLoading():
                seen = self._seen[message.rank]
                if not seen or seen[-1] != message.what:
                    seen.append(message.what)
                self._fractions[message.rank] = message.fraction

    @property
    def is_complete(self) -> bool:
        """Whether every rank is ready."""
        return len(self._ready) == self._num_ranks

    @property
    def first(self) -> RankReady:
        """What rank 0 says; the checkpoint is the same for all."""
        return self._ready[0]

    @property
    def device(self) -> str:
        """What computes, for a person to read."""
        return self.first.device if self._num_ranks == 1 else f"{self._num_ranks} x {self.first.device}"

    @property
    def num_blocks(self) -> int:
        """KV blocks that every rank has."""
        return min(ready.num_blocks for ready in self._ready.values())

    @property
    def what(self) -> str:
        """What the rank does that is furthest behind."""
        rank = self._last_rank()
        doing = self._seen[rank][-1] if self._seen[rank] else "starting"
        if self._num_ranks == 1:
            return doing
        return f"{doing}, rank {rank}; {len(self._ready)} of {self._num_ranks} ranks are ready"

    @property
    def fraction(self) -> float:
        """How much of that it has done, 0..1."""
        return self._fractions[self._last_rank()]

    def _last_rank(self) -> int:
        return min(
            self._seen, key=lambda rank: (rank in self._ready, len(self._seen[rank]), self._fractions[rank], rank)
        )
