"""One candidate of a plan: a layout and policy under a load, simulated as far as its verdict needs. Picklable."""

from __future__ import annotations

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
    num_allowed = (1.0 - config.slo.attainment) * simulation.workload.facts.num_requests
    num_missed = 0

    def count(outcome: Outcome) -> None:
        nonlocal num_missed
        num_missed += not config.slo.is_met(outcome)

    def look(sample: Sample) -> None:
        # Late without a first token is missed already, however it ends.
        num_late = sum(one.is_late for one in sample.waiting)
        if num_missed + num_late > num_allowed:
            raise _Hopeless(
                f"{num_missed + num_late} of {simulation.workload.facts.num_requests} requests had missed the SLO "
                f"after {sample.now_s:,.0f} s"
            )

    try:
        result = simulation.run(Watchers(on_outcome=count, on_sample=look))
    except _Hopeless as error:
        return Verdict(trial=trial, passes=False, why=str(error))
    everything, classes = result.values["all"], result.values["classes"]
    attainment = everything["attainment"]
    return Verdict(
        trial=trial,
        passes=attainment >= config.slo.attainment,
        attainment=attainment,
        ttft_p90_s={name: found["ttft_s"]["p90"] for name, found in classes.items()},
        tpot_p90_s=everything["tpot_s"]["p90"],
        utilisation=result.values["machine"]["utilisation"],
    )


def at_rate(trial: Trial, qps: float) -> Trial:
    """The same candidate under another load on all its replicas together."""
    workload = replace(trial.config.workload, qps=qps / trial.dp)
    return replace(trial, config=replace(trial.config, workload=workload))
