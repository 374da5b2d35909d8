"""When a request that comes now would get its first token, by the scheduler's own belief.

The sum of what is due before it and of its own prefill. Under the policies that go by deadline or slack, only
prompts whose deadline is earlier count as due before it: a short chat does not wait for the long document that was
there first. Under the others everything that waits counts, which is too much for those that would overtake.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.server.generation import GenerationSpec


@dataclass(frozen=True, slots=True)
class Before:
    """What is due before something."""

    work_s: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class WorkAhead:
    """What one scheduler has to prefill, at one moment: by priority and deadline, most urgent first."""

    scheduler: Scheduler  # for its beliefs, which are replaced whole and may be read from any thread
    ranks: tuple[tuple[int, float], ...]  # (priority, deadline), sorted
    work_s: tuple[float, ...]             # of each and all before it

    @classmethod
    def of(cls, scheduler: Scheduler) -> WorkAhead:
        """Taken on the scheduler's own thread; O(n log n) in its live prefills."""
        is_by_deadline = scheduler.policy.is_by_deadline
        rows = sorted(
            (seq.request.priority, seq.deadline_s if is_by_deadline else 0.0, seq.remaining_work_s)
            for seq in scheduler.sequences
            if seq.is_prefill
        )
        return cls(
            scheduler,
            tuple((priority, deadline_s) for priority, deadline_s, _ in rows),
            tuple(accumulate(work_s for _, _, work_s in rows)),
        )

    def due_before(self, priority: int, deadline_s: float) -> Before:
        """What goes before a request of this priority and deadline, itself included if it is there."""
        if not self.scheduler.policy.is_by_deadline:
            deadline_s = 0.0
        place = bisect_right(self.ranks, (priority, deadline_s))
        return Before(self.work_s[place - 1] if place else 0.0, place)


@dataclass(frozen=True, slots=True)
class Predicted:
    """A first token that has not come yet."""

    ttft_s: float
    target_s: float  # by which it is due, from arrival
    ahead_s: float   # of the former, what goes before it


class Forecast:
    """Predictions from the latest WorkAhead of each replica and from what was admitted since. Event loop only.

    A request is taken to go where its first token would come soonest, as placement does. update() alone is called on
    the engines' threads; it replaces one reference.
    """

    def __init__(self) -> None:
        self._ahead: dict[int, WorkAhead] = {}  # by replica
        self._since: dict[int, _Since] = {}     # by replica

    def update(self, ahead: WorkAhead, replica: int = 0) -> None:
        """What that replica's engine has now."""
        self._ahead[replica] = ahead

    def predict(self, spec: GenerationSpec) -> Predicted | None:
        """For the last choice of this request; None before an engine is ready."""
        best = self._best(spec)
        return None if best is None else best[1]

    def due_before(self, priority: int, deadline_s: float, own_work_s: float, replica: int = 0) -> Before:
        """What goes before a prompt that is there already and has so much work left itself."""
        ahead = self._ahead.get(replica)
        if ahead is None:
            return Before(0.0, 0)
        before = ahead.due_before(priority, deadline_s)
        return Before(max(0.0, before.work_s - own_work_s), max(0, before.num_prompts - 1))

    def count_in(self, spec: GenerationSpec) -> None:
        """This request was admitted: until the next update it is in nobody's sum."""
        best = self._best(spec)
        if best is None:
            return
        replica, _ = best
        ahead = self._ahead[replica]
        counted = self._counted(replica, ahead)
        for index in range(spec.num_choices):
            request = spec.engine_numbers(index)
            work_s = ahead.scheduler.predicted_prefill_s(request.num_prompt_tokens)
            counted.append((request.priority, request.arrival_s + self._target_s(ahead, request), work_s))

    def _best(self, spec: GenerationSpec) -> tuple[int, Predicted] | None:
        """The replica where the request would have its first token soonest, and when."""
        on_each = [(replica, self._predict_on(replica, ahead, spec)) for replica, ahead in tuple(self._ahead.items())]
        return min(on_each, key=lambda one: one[1].ttft_s, default=None)

    def _predict_on(self, replica: int, ahead: WorkAhead, spec: GenerationSpec) -> Predicted:
        requests = [spec.engine_numbers(index) for index in range(spec.num_choices)]
        own_s = sum(ahead.scheduler.predicted_prefill_s(request.num_prompt_tokens) for request in requests)
        last = requests[-1]
        target_s = self._target_s(ahead, last)
        deadline_s = last.arrival_s + target_s
        ahead_s = ahead.due_before(last.priority, deadline_s).work_s + sum(
            work_s
            for priority, other_s, work_s in self._counted(replica, ahead)
            if (priority, other_s) <= (last.priority, deadline_s)
        )
        return Predicted(ahead_s + own_s, target_s, ahead_s)

    def _counted(self, replica: int, ahead: WorkAhead) -> list[tuple[int, float, float]]:
        since = self._since.get(replica)
        if since is None or since.ahead is not ahead:
            since = self._since[replica] = _Since(ahead, [])
        return since.admitted

    @staticmethod
    def _target_s(ahead: WorkAhead, request: Request) -> float:
        total_s = ahead.scheduler.predicted_prefill_s(request.num_prompt_tokens)
        return ahead.scheduler.ttft_target_s(request, total_s)


@dataclass(frozen=True, slots=True)
class _Since:
    """What was admitted since that look: priority, deadline, work."""

    ahead: WorkAhead
    admitted: list[tuple[int, float, float]]
