"""When a request that comes now would get its first token, by the scheduler's own belief.

The sum of what is due before it and of its own prefill. Under the policies that go by deadline or slack, only
prompts whose deadline is earlier count as due before it: a short chat does not wait for the long document that was
there first. Under the others everything that waits counts, which is too much for those that would overtake.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.stats.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class QueuedAhead:
    """What is due before something."""

    work_s: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class TtftEstimate:
    """A first token that has not come yet."""

    ttft_s: float
    target_s: float  # by which it is due, from arrival
    ahead_s: float   # of the former, what goes before it


@dataclass(frozen=True, slots=True)
class PendingPrefills:
    """What one scheduler has to prefill, at one moment: by priority and deadline, most urgent first."""

    scheduler: Scheduler  # for its beliefs, which are replaced whole and may be read from any thread
    ranks: tuple[tuple[int, float], ...]  # (priority, deadline), sorted
    work_s: tuple[float, ...]             # of each and all before it
    admitted: list[tuple[int, float, float]] = field(default_factory=list)  # since then: priority, deadline, work

    @classmethod
    def of(cls, snapshot: Snapshot) -> PendingPrefills:
        """On the scheduler's own thread; O(n log n) in its live prefills."""
        scheduler = snapshot.scheduler
        is_by_deadline = scheduler.policy.is_by_deadline
        rows = sorted(
            (seq.request.priority, seq.deadline_s if is_by_deadline else 0.0, seq.remaining_work_s)
            for seq in snapshot.prefills
        )
        return cls(
            scheduler,
            tuple((priority, deadline_s) for priority, deadline_s, _ in rows),
            tuple(accumulate(work_s for _, _, work_s in rows)),
        )

    def queued_ahead(self, priority: int, deadline_s: float) -> QueuedAhead:
        """What goes before a request of this priority and deadline, itself included if it is there."""
        if not self.scheduler.policy.is_by_deadline:
            deadline_s = 0.0
        place = bisect_right(self.ranks, (priority, deadline_s))
        return QueuedAhead(self.work_s[place - 1] if place else 0.0, place)

    def predict(self, requests: Sequence[Request]) -> TtftEstimate:
        """For the last of these, sent together. On the event loop, as all that looks at `admitted`."""
        scheduler, last = self.scheduler, requests[-1]
        work_s = _work_s(scheduler, requests)
        target_s = scheduler.ttft_target_s(last, work_s[-1])
        rank = (last.priority, last.arrival_s + target_s)
        ahead_s = self.queued_ahead(*rank).work_s
        ahead_s += sum(other_s for priority, deadline_s, other_s in self.admitted if (priority, deadline_s) <= rank)
        return TtftEstimate(ahead_s + sum(work_s), target_s, ahead_s)


def _work_s(scheduler: Scheduler, requests: Sequence[Request]) -> list[float]:
    """Of each of the requests that come together, behind what is cached of it; what they share is computed once."""
    cache, seen, work_s = scheduler.memory.cache, set(), []
    for request in requests:
        num_tokens, num_cached = request.num_prompt_tokens, scheduler.num_cached_tokens(request)
        if cache is not None and request.reads_cache and request.prefix_keys in seen:
            num_cached = (num_tokens - 1) // cache.granule_tokens * cache.granule_tokens
        if request.prefix_keys:
            seen.add(request.prefix_keys)
        work_s.append(scheduler.predicted_work_s(num_tokens, num_cached))
    return work_s


class TtftEstimator:
    """Predictions from the latest PendingPrefills of each replica and from what was admitted since. Event loop only.

    A request is taken to go where its first token would come soonest, as placement does. update() alone is called on
    the engines' threads; it replaces one reference.
    """

    def __init__(self) -> None:
        self._pending: dict[int, PendingPrefills] = {}  # by replica

    def update(self, ahead: PendingPrefills, replica: int = 0) -> None:
        """What that replica's engine has now."""
        self._pending[replica] = ahead

    def predict(self, requests: Sequence[Request]) -> TtftEstimate | None:
        """For the last of these, sent together, on the replica where it is soonest; None before an engine is ready."""
        best = self._best(requests)
        return None if best is None else best[1]

    def num_uncached_tokens(self, request: Request) -> int:
        """Prompt tokens that no replica has in its prefix cache."""
        cached = [pending.scheduler.num_cached_tokens(request) for pending in tuple(self._pending.values())]
        return request.num_prompt_tokens - max(cached, default=0)

    def queued_ahead(self, priority: int, deadline_s: float, own_work_s: float, replica: int = 0) -> QueuedAhead:
        """What goes before a prompt that is there already and has so much work left itself."""
        pending = self._pending.get(replica)
        if pending is None:
            return QueuedAhead(0.0, 0)
        before = pending.queued_ahead(priority, deadline_s)
        return QueuedAhead(max(0.0, before.work_s - own_work_s), max(0, before.num_prompts - 1))

    def reserve(self, requests: Sequence[Request]) -> None:
        """These were admitted; count them until the next update includes them."""
        best = self._best(requests)
        if best is None:
            return
        pending, _ = best
        scheduler = pending.scheduler
        for request, work_s in zip(requests, _work_s(scheduler, requests), strict=True):
            deadline_s = request.arrival_s + scheduler.ttft_target_s(request, work_s)
            pending.admitted.append((request.priority, deadline_s, work_s))

    def _best(self, requests: Sequence[Request]) -> tuple[PendingPrefills, TtftEstimate] | None:
        on_each = [(pending, pending.predict(requests)) for pending in tuple(self._pending.values())]
        return min(on_each, key=lambda one: one[1].ttft_s, default=None)
