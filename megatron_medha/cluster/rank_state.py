"""What each KVP index's ranks know of each request, so that messages to them are deltas."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.core.batch import Batch
from megatron_medha.core.kv.ops import is_for
from megatron_medha.core.layout import ParallelLayout


class RankStateCache:
    """Turns batches into the steps of the ranks. All ranks of one KVP index, of whatever stage, get the same ones."""

    def __init__(self, layout: ParallelLayout, describe: Callable[[str], NewRequest]) -> None:
        """describe: a request as it stands now, with all its tokens."""
        self._describe = describe
        self._known: list[set[str]] = [set() for _ in range(layout.kvp)]
        # A single rank appends what it samples itself; several receive them, so that all append the same.
        self._broadcasts_tokens = layout.world_size > 1
        self._sampled: list[list[tuple[str, int]]] = [[] for _ in range(layout.kvp)]

    def steps(self, batch: Batch, runs_ahead: bool = False) -> list[RankStep]:
        """The step of each KVP index, also where it has no chunk in it. runs_ahead: see RankStep."""
        return [self._step(batch, kvp, runs_ahead) for kvp in range(len(self._known))]

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

    def _step(self, batch: Batch, kvp: int, runs_ahead: bool) -> RankStep:
        known = self._known[kvp]
        is_alone = len(self._known) == 1
        chunks = batch.chunks if is_alone else batch.chunks_on(kvp)
        kv_ops = batch.kv_ops if is_alone else tuple([op for op in batch.kv_ops if is_for(op, kvp)])
        # What is released is forgotten first: the same id may come again.
        known.difference_update(batch.released)
        sampled = tuple(token for token in self._sampled[kvp] if token[0] in known)
        self._sampled[kvp].clear()
        # A request gets blocks on a rank before its first chunk there, at the latest in the same batch.
        begun = dict.fromkeys([op.request_id for op in kv_ops if op.kind == "append" and op.request_id not in known])
        known.update(begun)
        new_requests = tuple([self._describe(request_id) for request_id in begun])
        return RankStep(
            batch.batch_id,
            chunks,
            new_requests,
            batch.released,
            sampled,
            kv_ops,
            batch.overtakes,
            batch.may_be_held,
            batch.predicted_s,
            max([chunk.num_tokens for chunk in batch.chunks], default=0) if batch.may_be_held else 0,
            min([chunk.kvp_ranks[0] for chunk in batch.chunks], default=0) if batch.may_be_held else 0,
            runs_ahead,
        )
