"""The same turns on one device that goes through them by some order, at no cost besides: what no server can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """A turn: when it came, and the seconds of its prefill alone."""

    arrival_s: float
    alone_s: float


# Lowest first; of a job and what is left of it.
ORDERS: dict[str, Callable[[Job, float], float]] = {
    "first come, first served": lambda job, left_s: job.arrival_s,
    "shortest remaining first": lambda job, left_s: left_s,
    "earliest deadline first": lambda job, left_s: job.arrival_s + 2.0 * job.alone_s,
}


def response_times_s(jobs: Sequence[Job], order: Callable[[Job, float], float]) -> list[float]:
    """Of each job, from its arrival to its end. Any may be interrupted for another at any moment."""
    coming = sorted(range(len(jobs)), key=lambda index: jobs[index].arrival_s, reverse=True)
    left_s: dict[int, float] = {}  # of those that have come
    found, now_s = [0.0] * len(jobs), 0.0
    while coming or left_s:
        if not left_s:
            now_s = max(now_s, jobs[coming[-1]].arrival_s)
        while coming and jobs[coming[-1]].arrival_s <= now_s:
            index = coming.pop()
            left_s[index] = jobs[index].alone_s
        first = min(left_s, key=lambda index: (order(jobs[index], left_s[index]), index))
        next_arrival_s = jobs[coming[-1]].arrival_s if coming else now_s + left_s[first]
        if now_s + left_s[first] <= next_arrival_s:
            now_s += left_s.pop(first)
            found[first] = now_s - jobs[first].arrival_s
        else:
            left_s[first] -= next_arrival_s - now_s
            now_s = next_arrival_s
    return found
