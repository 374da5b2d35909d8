"""What each KVP index's ranks know of each request, so that messages to them are deltas."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.core.batch import Batch
from megatron_medha.core.layout import ParallelLayout


class RankStateCache:
    """Turns batches into the steps of the ranks. All ranks of one KVP index, of whatever stage, get the same ones."""

    def __init__(self, layout: ParallelLayout, describe: Callable[[str], NewRequest]) -> None:
        """describe: a request as it stands now, with all its tokens."""
        self._describe = describe
        self._known: list[set[str]] = [set() for _ in range(layout.kvp)]
        # A single rank appends what it samples itself; several are told, so that all append the same.
        self._broadcasts_tokens = layout.world_size > 1
        self._sampled: list[list[tuple[str, int]]] = [[] for _ in range(layout.kvp)]

    def steps(self, batch: Batch) -> list[RankStep]:
        """The step of each KVP index, also where it has no chunk in it."""
        return [self._step(batch, kvp) for kvp in range(len(self._known))]

    def sampled(self, request_id: str, token_id: int) -> None:
        """The request goes on with this token; ranks that hold the request get it with their next step."""
        if self._broadcasts_tokens:
            for known, pending in zip(self._known, self._sampled, strict=True):
                if request_id in known:
                    pending.append((request_id, token_id))

    def clear(self) -> None:
        """The ranks came up empty."""
        for known, pending in zip(self._known, self._sampled, strict=True):
            known.clear()
            pending.clear()

    def _step(self, batch: Batch, kvp: int) -> RankStep:
        known = self._known[kvp]
        chunks = batch.chunks if len(self._known) == 1 else batch.chunks_on(kvp)
        # What is released is forgotten first: the same id may come again.
        known.difference_update(batch.released)
        sampled = tuple(token for token in self._sampled[kvp] if token[0] in known)
        self._sampled[kvp].clear()
        new_requests = tuple(
            self._describe(chunk.request_id) for chunk in chunks if chunk.request_id not in known
        )
        known.update(new.request_id for new in new_requests)
        return RankStep(batch.batch_id, chunks, new_requests, batch.released, sampled)
