"""Who runs first: each policy turns a sequence into a priority; the lowest runs first.

Every policy here is a straight line in time as long as its sequence makes no progress. A policy therefore
returns the line, not its value: a queue that knows the lines keeps 10,000 sequences in order without
evaluating 10,000 priorities at every step (core/scheduling/kinetic_queue.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_medha.core.kv.sequence import Sequence


@dataclass(slots=True, init=False)
class Priority:
    """The line at_zero + slope * now_s; lower runs first."""

    at_zero: float
    slope: float

    def __init__(self, at_zero: float, slope: float = 0.0) -> None:  # by hand for the reason StepLoad's is
        self.at_zero = at_zero
        self.slope = slope

    def at(self, now_s: float) -> float:
        """The priority at a moment."""
        return self.at_zero + self.slope * now_s


Policy = Callable[[Sequence], Priority]


def slack_s(seq: Sequence, now_s: float) -> float:
    """Seconds to spare before `seq` must run without a pause to meet its deadline; negative when late.

    s = arrival + d - t - w(t) (Medha section 4.1).
    """
    return seq.deadline_s - now_s - seq.remaining_work_s


def relative_slack(seq: Sequence, now_s: float) -> float:
    """Slack in units of the sequence's own total work: rho = s / w_total (Medha section 4.1)."""
    return slack_s(seq, now_s) / seq.total_work_s


def fcfs(seq: Sequence) -> Priority:
    """First come, first served."""
    return Priority(seq.request.arrival_s)


def sjf(seq: Sequence) -> Priority:
    """Shortest whole prefill first."""
    return Priority(seq.total_work_s)


def srpt(seq: Sequence) -> Priority:
    """Shortest remaining prefill first."""
    return Priority(seq.remaining_work_s)


def edf(seq: Sequence) -> Priority:
    """Earliest deadline first."""
    return Priority(seq.deadline_s)


# Those that go by slack keep a margin of it in hand. Who waits until its slack is just used up is late by the step that
# is in flight then, by the others whose turn has come too, and by what its own step takes beside its chunk.


def lrs(seq: Sequence) -> Priority:
    """Least absolute slack first."""
    return Priority(slack_s(seq, 0.0) - seq.margin_s, -1.0)


def lars(seq: Sequence) -> Priority:
    """Least relative slack first: length-aware, so neither long nor short requests are always the urgent ones."""
    return Priority((slack_s(seq, 0.0) - seq.margin_s) / seq.total_work_s, -1.0 / seq.total_work_s)


def hrrn(seq: Sequence) -> Priority:
    """Highest response ratio (waited + work) / work next."""
    return Priority(seq.request.arrival_s / seq.total_work_s - 1.0, -1.0 / seq.total_work_s)


def ssjf(seq: Sequence) -> Priority:
    """Shortest predicted job first: prefill and the answer as core/scheduling/output_length.py predicts it.

    Speculative shortest-job-first of Qiu et al. (arXiv:2404.08509).
    """
    return Priority(seq.total_work_s + seq.answer_work_s)


def qlm(seq: Sequence) -> Priority:
    """Who is estimated to meet its deadline, least slack first; behind them, in order of arrival, who is not.

    After QLM (Patke et al., arXiv:2407.00047), which estimates waiting times from the work queued ahead and orders
    the queue for the fewest missed targets. The estimate is made on arrival: `Sequence.estimated_wait_s`.
    """
    latest_start_s = seq.deadline_s - seq.total_work_s
    if seq.request.arrival_s + seq.estimated_wait_s > latest_start_s:
        return Priority(_BEHIND_ALL_S + seq.request.arrival_s)
    return Priority(latest_start_s)


_BEHIND_ALL_S = 1e12  # later than any moment of any run
NEEDS_WAIT_ESTIMATE = frozenset({"qlm"})  # policies that read Sequence.estimated_wait_s

POLICIES: dict[str, Policy] = {
    policy.__name__: policy for policy in (fcfs, sjf, srpt, edf, lrs, lars, hrrn, ssjf, qlm)
}
