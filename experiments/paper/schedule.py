"""The experiments as tasks of known length, and how long those left will take."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One experiment."""

    name: str
    core_s: float                   # seconds of one core
    needs: tuple[str, ...] = ()     # experiments whose code it uses


def eta_s(under_way: Iterable[tuple[Task, float]], left: Sequence[Task], num_jobs: int) -> float:
    """Seconds until all are done, each process taking the next of `left` when it is free.

    under_way: with the seconds since it began. The headline divides its work over all processes.
    """
    free_s = [0.0] * num_jobs
    for index, (task, ran_s) in enumerate(under_way):
        if task.name == "headline":
            free_s = [max(0.0, task.core_s / num_jobs - ran_s)] * num_jobs
        else:
            free_s[index] = max(0.0, task.core_s - ran_s)
    heapq.heapify(free_s)
    for task in left:
        heapq.heappush(free_s, heapq.heappop(free_s) + task.core_s)
    return max(free_s)
