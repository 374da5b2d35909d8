"""One candidate of a plan: a layout and policy under a load, simulated as far as its verdict needs. Picklable."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megatron_medha.core.errors import ConfigError
from megatron_medha.engine.outcome import Outcome
from megatron_medha.sim.simulation import Sample, Simulation, SimulationConfig, Watchers


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A replica under its share of the load; `dp` of them make the candidate."""

    name: str  # of who decides in it
    config: SimulationConfig
    dp: int = 1
    each_class: bool = False  # slo.attainment is asked of every length class, not only of all requests together

    @property
    def num_gpus(self) -> int:
        """Of all replicas."""
        return self.config.setup.layout.world_size * self.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a trial has shown."""

    trial: Trial
    passes: bool
    attainment: float | None = None  # None: ended early, it could no longer pass
    attainment_by_class: dict[str, float] | None = None  # of length classes with requests
    ttft_p90_s: dict[str, float | None] | None = None  # by length class
    tpot_p90_s: float | None = None
    utilisation: float | None = None
    why: str = ""                    # it fails or cannot be


class _Hopeless(Exception):
    """So many requests have missed that the trial cannot pass any more."""


def judge(trial: Trial) -> Verdict:
    """Simulate one replica, and stop as soon as it cannot pass: an overloaded one would take the longest."""
    config = trial.config
    try:
        simulation = Simulation(config)
    except ConfigError as error:
        return Verdict(trial=trial, passes=False, why=str(error))

    def judged_as(length_class: str) -> str:
        return f"{length_class} " if trial.each_class else ""

    classes_of = (config.classes.of(request.num_prompt_tokens) for request in simulation.workload.requests())
    num_requests = Counter(map(judged_as, classes_of))
    num_missed: Counter[str] = Counter()

    def count(outcome: Outcome) -> None:
        if not config.slo.is_met(outcome):
            num_missed[judged_as(config.classes.of(outcome.request.num_prompt_tokens))] += 1

    def look(sample: Sample) -> None:
        # Late without a first token is missed already, however it ends.
        lost = num_missed + Counter(judged_as(one.length_class) for one in sample.waiting if one.is_late)
        for name, num_lost in lost.items():
            if num_lost > (1.0 - config.slo.attainment) * num_requests[name]:
                raise _Hopeless(
                    f"{num_lost} of {num_requests[name]} {name}requests had missed the SLO after {sample.now_s:,.0f} s"
                )

    try:
        result = simulation.run(Watchers(on_outcome=count, on_sample=look))
    except _Hopeless as error:
        return Verdict(trial=trial, passes=False, why=str(error))
    everything, classes = result.values["all"], result.values["classes"]
    attainment = everything["attainment"]
    by_class = {name: found["attainment"] for name, found in classes.items() if found["attainment"] is not None}
    asked = by_class.values() if trial.each_class else [attainment]
    return Verdict(
        trial=trial,
        passes=min(asked) >= config.slo.attainment,
        attainment=attainment,
        attainment_by_class=by_class,
        ttft_p90_s={name: found["ttft_s"]["p90"] for name, found in classes.items()},
        tpot_p90_s=everything["tpot_s"]["p90"],
        utilisation=result.values["machine"]["utilisation"],
    )


def at_rate(trial: Trial, qps: float) -> Trial:
    """The same candidate under another load on all its replicas together."""
    workload = replace(trial.config.workload, qps=qps / trial.dp)
    return replace(trial, config=replace(trial.config, workload=workload))
