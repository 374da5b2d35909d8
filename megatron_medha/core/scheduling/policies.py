"""Who runs first: each policy turns a sequence into a priority; the lowest runs first.

Every policy here is a straight line in time as long as its sequence makes no progress. A policy therefore
returns the line, not its value: a queue that knows the lines keeps 10,000 sequences in order without
evaluating 10,000 priorities at every step (core/scheduling/kinetic_queue.py).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.request import Request


@dataclass(slots=True)
class Priority:
    """The line at_zero + slope * now_s; lower runs first."""

    at_zero: float
    slope: float = 0.0

    def at(self, now_s: float) -> float:
        """The priority at a moment."""
        return self.at_zero + self.slope * now_s


@dataclass(frozen=True, slots=True)
class Policy:
    """Who runs first, and what else is to be known of that order. A new policy is one of these, and a file in conf/."""

    priority: Callable[[Sequence], Priority]
    is_by_deadline: bool = False  # an earlier deadline goes first, as a rule: what waits with a later one is no wait
    ended: Callable[[Sequence], None] | None = None  # called with every sequence that has ended, for those that learn


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


# Policies that go by slack start a margin before the deadline. Who waits until its slack is just used up is late by the
# step that is in flight then, by the others whose turn has come too, and by what its own step takes beside its chunk.


def lrs(seq: Sequence) -> Priority:
    """Least absolute slack first."""
    return Priority(slack_s(seq, 0.0) - seq.margin_s, -1.0)


def lars(seq: Sequence) -> Priority:
    """Least relative slack first: length-aware, so neither long nor short requests are always the urgent ones.

    What a prefill has computed makes it less urgent, so that a long one lets others pass. Two turns of sessions would
    alternate, chunk by chunk, and the first would end with the second: a turn stays as urgent as it was.
    """
    left_s = seq.total_work_s if seq.is_mostly_cached else seq.remaining_work_s
    return Priority((seq.deadline_s - left_s - seq.margin_s) / seq.total_work_s, -1.0 / seq.total_work_s)


def hrrn(seq: Sequence) -> Priority:
    """Highest response ratio (waited + work) / work next."""
    return Priority(seq.request.arrival_s / seq.total_work_s - 1.0, -1.0 / seq.total_work_s)


POLICIES: dict[str, Policy] = {
    "fcfs": Policy(fcfs),
    "sjf": Policy(sjf),
    "srpt": Policy(srpt),
    "edf": Policy(edf, is_by_deadline=True),
    "lrs": Policy(lrs, is_by_deadline=True),
    "lars": Policy(lars, is_by_deadline=True),
    "hrrn": Policy(hrrn, is_by_deadline=True),
}


def is_user_policy(name: str) -> bool:
    """Whether a policy's name says where a user's own is: package.module:function."""
    return ":" in name


def policy_named(name: str) -> Policy:
    """One of POLICIES, or the user's own of that name, imported and tried on a request. Raises ConfigError."""
    if not is_user_policy(name):
        return POLICIES[name]
    module_name, _, attribute = name.partition(":")
    where = f"scheduler.policy={name}"
    if not module_name:
        raise ConfigError(f"{where}: no module is named; write package.module:function")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: there is no module {error.name}; install it, or run with PYTHONPATH=DIR of the folder it is in"
        ) from None
    except AttributeError:
        what = attribute or "function named"
        raise ConfigError(f"{where}: {module_name} has no {what}; write package.module:function") from None
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{where}: importing {module_name} raised {type(error).__name__}: {error}") from error
    policy = found if isinstance(found, Policy) else Policy(found)
    _try_policy(policy, where)
    return policy


def _try_policy(policy: Policy, where: str) -> None:
    """ConfigError unless it has a priority for a request that has just arrived."""
    request = Request(request_id="sample", num_prompt_tokens=1000, max_output_tokens=10, arrival_s=1.0)
    sample = Sequence(
        request=request, deadline_s=2.0, triage_deadline_s=2.0, total_work_s=0.25, remaining_work_s=0.25
    )
    expected = "a policy takes a Sequence and returns a Priority(at_zero, slope) of finite numbers"
    try:
        priority = policy.priority(sample)
    except Exception as error:  # whatever the user's function raises
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: called with a request it raised {what}; {expected}") from error
    if not isinstance(priority, Priority) or not (math.isfinite(priority.at_zero) and math.isfinite(priority.slope)):
        raise ConfigError(f"{where}: it returned {priority!r}; {expected}")
