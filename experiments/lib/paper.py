"""What the experiments after the Medha paper share: its models and clusters, the systems compared, one measured run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

import megatron_medha
from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import Decisions
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions
from megatron_medha.sim.baselines.instances_world import InstancesWorld
from megatron_medha.sim.baselines.ring_cost import RingCost
from megatron_medha.sim.isolated import IsolatedTimes
from megatron_medha.sim.ledger import Ledger
from megatron_medha.sim.measured_world import MeasuredWorld
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.sim.system import InstancesSetup, build_system
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.outcome import Outcome, Slo
from megatron_medha.stats.summary import LengthClasses, Summary, percentile
from megatron_medha.workload.workload import Workload, WorkloadConfig

LLAMA3_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 24,
)  # fmt: skip
LLAMA3_70B = ModelShape(
    name="llama3_70b", num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 24,
)  # fmt: skip

MEMORY_SHARE = 0.9  # of a device, for weights and KV; vLLM's default
BLOCK_SIZE = 16


def hardware(name: str, num_devices: int) -> Hardware:
    """conf/hardware/<name>, so many of it."""
    return replace(_composed(f"hardware={name}").hardware, num_devices=num_devices)


def scheduler(name: str, *overrides: str) -> SchedulerConfig:
    """conf/scheduler/<name>, with overrides like scheduler.step_budget_s=0.02."""
    return _composed(f"scheduler={name}", *overrides).scheduler


def _composed(*words: str) -> SimulateOptions:
    return freeze(compose("simulate", SimulateOptions, words), SimulateOptions)


def engine() -> EngineCosts:
    """conf/engine/medha: the same host costs for all systems."""
    path = Path(megatron_medha.__file__).parents[1] / "conf" / "engine" / "medha.yaml"
    return EngineCosts(**OmegaConf.load(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A model on a cluster."""

    shape: ModelShape
    hardware: Hardware
    engine: EngineCosts

    def cost(self, layout: ParallelLayout) -> ClusterCost:
        """Of one replica."""
        return ClusterCost(shape=self.shape, hardware=self.hardware, engine=self.engine, layout=layout)

    def kv_tokens(self, num_devices: int) -> int:
        """Tokens of KV that so many devices hold beside one copy of the weights."""
        assert self.hardware.memory_bytes is not None
        weights = self.shape.num_params * self.shape.bytes_per_element
        free = num_devices * MEMORY_SHARE * self.hardware.memory_bytes - weights
        return int(free / self.shape.kv_bytes_per_token)

    def scheduler(
        self,
        config: SchedulerConfig,
        layout: ParallelLayout,
        kv_tokens: int | None = None,
        shard_tokens: int | None = None,
    ) -> Decisions:
        """Our scheduler on one replica; its belief is the truth.

        kv_tokens: other memory than there is. shard_tokens: of a request on one KVP rank; None: all that fit.
        """
        setup = SchedulerSetup(
            config=config,
            shape=self.shape,
            hardware=self.hardware,
            engine=self.engine,
            layout=layout,
            num_blocks=(kv_tokens or self.kv_tokens(layout.tp * layout.spp)) // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_tokens_per_shard=shard_tokens,
            learns=False,
        )
        return build_system(setup)

    def truth(self, layout: ParallelLayout, shard_tokens: int | None = None) -> Truth:
        """What its batches take."""
        tokens = shard_tokens or self.kv_tokens(layout.tp * layout.spp) // BLOCK_SIZE * BLOCK_SIZE
        return Truth(self.cost(layout), tokens, TruthConfig(), seed=0)

    def isolated(self, layout: ParallelLayout, max_tokens: int) -> IsolatedTimes:
        """TTFT by length of a prompt alone under Medha's scheduler: what all systems' deadlines follow from."""
        return IsolatedTimes(
            lambda: self.scheduler(SchedulerConfig(), layout),
            self.truth(layout),
            lambda: Pipeline(layout.spp, layout.kvp),
            max_tokens,
            self.engine.request_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """A cluster cut into instances of tp devices, for the systems that are not our scheduler."""

    cluster: Cluster
    tp: int

    @property
    def cost(self) -> RingCost:
        """Of rings of instances."""
        return RingCost(
            instance=self.cluster.cost(ParallelLayout(tp=self.tp)),
            shape=self.cluster.shape,
            hardware=self.cluster.hardware,
            tp=self.tp,
        )

    def system(self, name: str) -> Decisions:
        """conf/system/<name>."""
        return build_system(
            InstancesSetup(
                config=replace(_composed(f"system={name}").system, instance_tp=self.tp),
                shape=self.cluster.shape,
                hardware=self.cluster.hardware,
                engine=self.cluster.engine,
                num_instances=self.cluster.hardware.num_devices // self.tp,
                tokens_per_instance=self.cluster.kv_tokens(self.tp),
            )
        )


@dataclass(slots=True)
class Measured:
    """Outcomes of a run."""

    outcomes: list[Outcome]
    summary: Summary
    end_s: float

    def ttfts_s(self, length_class: str | None, classes: LengthClasses) -> list[float]:
        """Ascending; of requests without a first token the time they had waited when the run ended."""
        return sorted(
            outcome.ttft_s if outcome.ttft_s is not None else self.end_s - outcome.request.arrival_s
            for outcome in self.outcomes
            if length_class is None or classes.of(outcome.request.num_prompt_tokens) == length_class
        )

    def values(self, classes: LengthClasses) -> dict[str, Any]:
        """What goes into results.json."""
        values: dict[str, Any] = {}
        for name in (None, "short", "long"):
            ttfts_s = self.ttfts_s(name, classes)
            names = ("short", "medium", "long") if name is None else (name,)
            if ttfts_s:
                values[name or "all"] = {
                    "num_requests": len(ttfts_s),
                    **{f"ttft_p{percent}_s": round(percentile(ttfts_s, percent), 4) for percent in (50, 90, 99)},
                    "attainment": round(self.summary.attainment(names) or 0.0, 4),
                }
        tpots_s = sorted(outcome.tpot_s for outcome in self.outcomes if outcome.tpot_s is not None)
        values["all"] |= {f"tpot_p{percent}_s": round(percentile(tpots_s, percent), 5) for percent in (50, 90, 99)}
        values["num_without_token"] = sum(outcome.ttft_s is None for outcome in self.outcomes)
        values["end_s"] = round(self.end_s, 3)
        return values


def measure(
    decisions: Decisions,
    workload: WorkloadConfig,
    seed: int,
    isolated_s: Callable[[int], float],
    slo: Slo,
    *,
    runs_on: tuple[ParallelLayout, Truth] | None,
    front_s: float,
    drain_s: float,
    label: str,
) -> Measured:
    """One run to `drain_s` after the last arrival.

    runs_on: None for a system that names its own instances; front_s: of every request outside of all steps.
    """
    drawn = Workload(workload, seed)
    outcomes: list[Outcome] = []
    summary = Summary(LengthClasses(), slo)
    ledger = Ledger(summary, slo, isolated_s, outcomes.append)
    until_s = drawn.facts.last_arrival_s + drain_s
    total = round(min(until_s, 10 * drawn.facts.last_arrival_s))
    with tqdm(total=total, desc=label, unit="s", leave=False, mininterval=1.0) as bar:

        def advance(now_s: float) -> None:
            bar.update(max(0, round(now_s) - bar.n))

        sample_s = drawn.facts.last_arrival_s / 200
        if runs_on is None:
            world: MeasuredWorld = InstancesWorld(drawn.requests(), ledger, until_s, sample_s, advance, front_s)
        else:
            layout, truth = runs_on
            pipeline = Pipeline(layout.spp, layout.kvp)
            world = MeasuredWorld(
                drawn.requests(), pipeline, truth, ledger, until_s, sample_s, advance, front_s
            )
        serve(decisions, world)
    ledger.close()
    return Measured(outcomes, summary, min(world.now_s(), until_s))


def h100(shape: ModelShape, layout: ParallelLayout) -> Cluster:
    """As many H100 as the layout has ranks."""
    return Cluster(shape=shape, hardware=hardware("h100", layout.world_size), engine=engine())


def alone_s(cluster: Cluster, layout: ParallelLayout, config: SchedulerConfig, num_tokens: int) -> float:
    """TTFT of one prompt alone, whether or not its KV would fit."""
    times = IsolatedTimes(
        lambda: cluster.scheduler(config, layout, 2 * num_tokens),
        cluster.truth(layout),
        lambda: Pipeline(layout.spp, layout.kvp),
        num_tokens,
        cluster.engine.request_s,
    )
    return times(num_tokens)


def best_alone_s(cluster: Cluster, layout: ParallelLayout, chunk_sizes: Iterable[int], num_tokens: int) -> float:
    """TTFT of one prompt alone in chunks of the best of these sizes."""
    return min(alone_s(cluster, layout, fixed_chunks(size), num_tokens) for size in chunk_sizes)


class Results:
    """results.json of an experiment: runs by name, written after each, so that a broken-off run goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._values: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] == settings:
                self._values = stored

    @property
    def runs(self) -> dict[str, Any]:
        """By name."""
        runs: dict[str, Any] = self._values["runs"]
        return runs

    def notes(self, group: str) -> dict[str, Any]:
        """Values of another kind, by name."""
        notes: dict[str, Any] = self._values.get(group, {})
        return notes

    def note(self, group: str, name: str, value: Any) -> None:
        """Add one of those, and write the file."""
        self._values.setdefault(group, {})[name] = value
        self._write()

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Add a run, and write the file."""
        self.runs[name] = values
        self._write()

    def sort(self) -> None:
        """By name, for runs that end in no order of their own, and write the file."""
        for group in self._values:
            if group != "settings":
                self._values[group] = dict(sorted(self._values[group].items()))
        self._write()

    def _write(self) -> None:
        # At once, so that a run that is killed leaves what it had.
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self._values, indent=1) + "\n")
        beside.replace(self._path)


def quiet() -> None:
    """No bars of single runs from this process: another one shows how far all of them are."""
    os.environ["TQDM_DISABLE"] = "1"


def fixed_chunks(num_tokens: int) -> SchedulerConfig:
    """Chunks of one size, for a prompt that has the machine to itself."""
    return SchedulerConfig(chunking=Chunking.FIXED, fixed_chunk_tokens=num_tokens)


def figure(width: float = 6.0, height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made: tuple[Any, Any] = pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained")
    return made
