"""One candidate of a plan: a layout and policy under a load, simulated as far as its verdict needs. Picklable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_medha.core.errors import ConfigError
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks, StateSample
from megatron_medha.stats.request_stats import RequestStats


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCandidate:
    """A candidate: every one sees the same requests, however many replicas they are placed on."""

    name: str  # of who decides in it
    config: SimulationConfig
    each_class: bool = False  # slo.attainment is asked of every length class, not only of all requests together

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.config.dp

    @property
    def num_gpus(self) -> int:
        """Of all replicas."""
        return self.config.setup.layout.world_size * self.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateVerdict:
    """What a trial has shown."""

    trial: PlanCandidate
    passes: bool
    attainment: float | None = None  # None: ended early, it could no longer pass
    attainment_by_class: dict[str, float] | None = None  # of length classes with requests
    ttft_p90_s: dict[str, float | None] | None = None  # by length class
    tpot_p90_s: float | None = None
    utilisation: float | None = None
    hit_rate: float | None = None    # share of prompt tokens that were cached
    why: str = ""                    # it fails or cannot be
    failed_after_s: float | None = None  # simulated seconds until it could not pass any more


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolatedBound:
    """What a candidate cannot do, however small the load is: prompts alone on it."""

    trial: PlanCandidate
    longest_prompt_tokens: int
    longest_ttft_s: float             # of that prompt
    num_requests: Mapping[str, int]   # by what slo.attainment is asked of: "" or a length class
    num_late: Mapping[str, int]       # whose first token is late even so

    @property
    def why(self) -> str:
        """Why it cannot pass; empty if it might."""
        for name, num_late in self.num_late.items():
            if _are_too_many(num_late, self.num_requests[name], self.trial.config.slo.attainment):
                return (
                    f"{num_late} of {self.num_requests[name]} {name}requests are late even alone: "
                    f"{self.longest_prompt_tokens:,} tokens take {self.longest_ttft_s:.2f} s"
                )
        return ""


def isolated_bound(trial: PlanCandidate) -> IsolatedBound | None:
    """The bound of a candidate; None where it is not known, or where the candidate cannot be."""
    try:
        return _isolated_bound(trial, Simulation(trial.config))
    except ConfigError:
        return None


def _isolated_bound(trial: PlanCandidate, simulation: Simulation) -> IsolatedBound | None:
    ttft_lower_bound_s = simulation.ttft_lower_bound_s()
    if ttft_lower_bound_s is None:
        return None
    config = trial.config
    num_requests: Counter[str] = Counter()
    num_late: Counter[str] = Counter()
    for request in simulation.workload.requests():
        num_tokens = request.num_prompt_tokens
        name = _asked_of(trial, config.classes.of(num_tokens))
        num_requests[name] += 1
        num_late[name] += ttft_lower_bound_s(num_tokens) > config.slo.deadline_s(simulation.isolated_s(num_tokens))
    longest = simulation.workload.facts.max_prompt_tokens
    return IsolatedBound(
        trial=trial,
        longest_prompt_tokens=longest,
        longest_ttft_s=ttft_lower_bound_s(longest),
        num_requests=num_requests,
        num_late=num_late,
    )


def _are_too_many(num_missed: int, num_requests: int, attainment: float) -> bool:
    return num_missed > (1.0 - attainment) * num_requests + 1e-6  # 1 - 0.9 is less than a tenth


def _asked_of(trial: PlanCandidate, length_class: str) -> str:
    """The group of which slo.attainment is asked: all requests together, or a length class."""
    return f"{length_class} " if trial.each_class else ""


class _CannotPass(Exception):
    """So many requests have missed that the trial cannot pass any more."""

    def __init__(self, why: str, after_s: float) -> None:
        super().__init__(why)
        self.after_s = after_s


def evaluate_candidate(trial: PlanCandidate, runs_to_the_end: bool = False) -> CandidateVerdict:
    """Simulate it, and stop as soon as it cannot pass: an overloaded one would take the longest.

    runs_to_the_end: do not stop, and say how far it is from passing.
    """
    config = trial.config
    try:
        simulation = Simulation(config)
    except ConfigError as error:
        return CandidateVerdict(trial=trial, passes=False, why=str(error))

    bound = _isolated_bound(trial, simulation)
    if bound is not None and bound.why and not runs_to_the_end:
        return CandidateVerdict(trial=trial, passes=False, why=bound.why)
    classes = (config.classes.of(request.num_prompt_tokens) for request in simulation.workload.requests())
    num_requests = Counter(_asked_of(trial, one) for one in classes)
    num_missed: Counter[str] = Counter()

    def count(outcome: RequestStats) -> None:
        if not config.slo.is_met(outcome):
            num_missed[_asked_of(trial, config.classes.of(outcome.request.num_prompt_tokens))] += 1

    def look(sample: StateSample) -> None:
        # Late without a first token is missed already, however it ends.
        lost = num_missed + Counter(_asked_of(trial, one.length_class) for one in sample.waiting if one.is_late)
        for name, num_lost in lost.items():
            if _are_too_many(num_lost, num_requests[name], config.slo.attainment):
                raise _CannotPass(
                    f"{num_lost} of {num_requests[name]} {name}requests had missed the SLO after {sample.now_s:,.0f} s",
                    sample.now_s,
                )

    try:
        hooks = SimulationHooks() if runs_to_the_end else SimulationHooks(on_outcome=count, on_sample=look)
        result = simulation.run(hooks)
    except _CannotPass as error:
        return CandidateVerdict(trial=trial, passes=False, why=str(error), failed_after_s=error.after_s)
    everything, classes = result.values["all"], result.values["classes"]
    attainment = everything["attainment"]
    by_class = {name: found["attainment"] for name, found in classes.items() if found["attainment"] is not None}
    asked = by_class.values() if trial.each_class else [attainment]
    return CandidateVerdict(
        trial=trial,
        passes=min(asked) >= config.slo.attainment,
        attainment=attainment,
        attainment_by_class=by_class,
        ttft_p90_s={name: found["ttft_s"]["p90"] for name, found in classes.items()},
        tpot_p90_s=everything["tpot_s"]["p90"],
        utilisation=result.values["machine"]["utilisation"],
        hit_rate=everything["hit_rate"],
    )


def at_rate(trial: PlanCandidate, qps: float) -> PlanCandidate:
    """The same candidate under another load: the same requests, and more of them where they come faster."""
    workload = trial.config.workload
    assert workload.qps is not None and workload.num_requests is not None, "a trial is given so many at some rate"
    num_requests = max(workload.num_requests, round(workload.num_requests * qps / workload.qps))
    workload = replace(workload, qps=qps, num_requests=num_requests)
    return replace(trial, config=replace(trial.config, workload=workload))
