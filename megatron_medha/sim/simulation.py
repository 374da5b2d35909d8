"""One simulation from configuration to summary: system, world, ledger and truth put together. No files, no console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf
from typing import Any

from megatron_medha.core.cost.utilisation import mbu, mfu
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.ports import Observer, SchedulerProtocol
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.placement import ReplicaLoad
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.baselines.instances_world import InstancesSimRuntime, PredictedTruth
from megatron_medha.sim.fleet import Fleet
from megatron_medha.sim.isolated import IsolatedTimes
from megatron_medha.sim.ledger import Ledger, LiveRequest
from megatron_medha.sim.measured_world import MeasuredSimRuntime
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.sim.system import InstancesSetup, build_system, pipeline_for
from megatron_medha.sim.truth import ComputedWork, Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.snapshot import take_snapshot
from megatron_medha.stats.summary import LengthClasses, Summary
from megatron_medha.stats.timeline import StageSpan
from megatron_medha.workload.request_feed import RequestFeed
from megatron_medha.workload.workload import Workload, WorkloadConfig

_MAX_CACHED_ISOLATED = 64  # tables that are kept, of up to thousands of numbers each
_NUM_SAMPLES = 400  # of the state, over the time in which requests arrive


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """All that decides what happens in a simulation: the same config gives the same results, to the last bit.

    setup: our scheduler on the machine, which decides where `instances` is None; prompts alone under it, with the
    default configuration, set everybody's deadlines. instances: a system of instances on the same GPUs.
    dp: replicas of that machine, which the router of `medha serve` gives the requests to.
    """

    setup: SchedulerSetup
    instances: InstancesSetup | None = None
    dp: int = 1
    workload: WorkloadConfig
    slo: Slo = Slo()
    classes: LengthClasses = LengthClasses()
    truth: TruthConfig = TruthConfig()
    seed: int = 0
    max_drain_s: float | None = None  # after the last arrival the run ends, whatever is left; None: when all have ended
    sample_s: float | None = None     # between two samples of the state; None: _NUM_SAMPLES in all

    @property
    def max_request_tokens(self) -> int:
        """No request may have more, prompt and answer."""
        most = min(self.setup.shape.max_context_len, self.setup.layout.kvp * self.setup.shard_tokens)
        # What no machine of the scheduler's could hold has no time alone, and with that no deadline.
        return most if self.instances is None else min(most, self.instances.max_request_tokens)

    @property
    def granule_tokens(self) -> int | None:
        """Of the prefix cache; None: there is none."""
        kv, block_size = self.setup.kv, self.setup.block_size
        return kv.tokens_per_granule(block_size) if kv.prefix_cache and self.instances is None else None

    def pipeline(self, on_span: Callable[[StageSpan], None] | None = None) -> Pipeline:
        """The stages and KVP ranks that batches run on; of a system of instances, one stage with each as a rank."""
        if self.instances is not None:
            return Pipeline(1, self.instances.num_instances, on_span)
        return pipeline_for(self.setup, on_span)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A request without its first token, at a moment."""

    request_id: str
    length_class: str
    relative_slack: float  # (deadline - now - remaining work) / work, by T_iso; negative once late
    is_started: bool
    is_late: bool          # its first-token deadline has passed


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSample:
    """The state of the replica at a moment."""

    now_s: float
    num_ended: int
    num_decoding: int
    waiting: tuple[WaitingRequest, ...]
    kv_used_share: float | None  # of all blocks; None for a system that does not tell


@dataclass(slots=True)
class SimulationHooks:
    """What looks on while a simulation runs, without changing it."""

    on_outcome: Callable[[RequestStats], None] = lambda outcome: None
    on_sample: Callable[[StateSample], None] = lambda sample: None
    on_span: Callable[[StageSpan], None] | None = None
    observers: tuple[Observer, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What came out; the values are plain numbers, ready for JSON."""

    summary: Summary
    values: dict[str, Any]
    end_s: float  # simulated time of the last event


class Simulation:
    """A simulation that is ready to run, once. Raises ConfigError for a workload that cannot be."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.workload = Workload(config.workload, config.seed)
        setup = config.setup
        max_request_tokens = config.max_request_tokens
        if self.workload.facts.max_request_tokens > max_request_tokens:
            raise ConfigError(
                f"the workload's longest request has {self.workload.facts.max_request_tokens:,} tokens, but this "
                f"machine has KV memory for requests of up to {max_request_tokens:,}; give it more GPUs (parallel.tp, "
                "parallel.spp, parallel.kvp), a larger parallel.max_tokens_per_shard if set, or another workload"
            )
        self._cost = setup.cluster_cost
        # The system is Medha's own whatever is under test: all are held to the same deadlines.
        self.isolated_s = self._isolated_times(replace(setup, config=SchedulerConfig(), learns=False))

    def _isolated_times(self, setup: SchedulerSetup) -> IsolatedTimes:
        config = self.config
        truth = replace(config.truth, noise=0.0)
        return _isolated_times(setup, truth, self.workload.facts.max_prompt_tokens)

    def ttft_lower_bound_s(self) -> Callable[[int], float] | None:
        """A bound by prompt length: no load, however small, gives a first token sooner. None: it is not known.

        It is not where prompts may have been computed in part before they come.
        """
        if self.config.instances is not None or (self.config.granule_tokens and self.workload.has_keys):
            return None
        own_s, reference_s = self._isolated_times(self.config.setup), self.isolated_s
        return lambda num_tokens: min(own_s(num_tokens), reference_s(num_tokens))

    def run(self, watchers: SimulationHooks, system: SchedulerProtocol | None = None) -> SimulationResult:
        """From the first arrival to the end. system: what decides; None: what the config says."""
        config, facts = self.config, self.workload.facts
        systems = [system] if system else [build_system(config.instances or config.setup) for _ in range(config.dp)]
        summary = Summary(config.classes, config.slo)
        ledger = Ledger(summary, config.slo, self.isolated_s, watchers.on_outcome)
        memories = [one for one in (getattr(system, "memory", None) for system in systems) if isinstance(one, KVMemory)]
        kv_shares: list[float] = []

        def look(now_s: float) -> None:
            sample = self._sample(now_s, ledger, memories)
            if sample.kv_used_share is not None:
                kv_shares.append(sample.kv_used_share)
            watchers.on_sample(sample)

        feed = self.workload.feed(config.granule_tokens)
        until_s = float("inf") if config.max_drain_s is None else facts.last_arrival_s + config.max_drain_s
        sample_s = config.sample_s or max(facts.last_arrival_s / _NUM_SAMPLES, 1e-3)
        api_server_s = self._cost.engine.request_s
        if len(systems) == 1:
            world, work = self._world(feed, ledger, until_s, sample_s, look, watchers.on_span, True)
            worlds, works = [world], [work]
            _join(systems[0], world)
            serve(systems[0], world, watchers.observers)
            end_s = world.now_s()
        else:
            # What watches batches goes by their ids, which every replica counts for itself.
            assert watchers.on_span is None and not watchers.observers, "these watch one replica"
            made = [self._world(feed, ledger, until_s, inf, lambda now_s: None, None, False) for _ in systems]
            worlds, works = [world for world, _ in made], [work for _, work in made]
            for one, its_world in zip(systems, worlds, strict=True):
                _join(one, its_world)

            def load_of(replica: int, request: Request) -> ReplicaLoad:
                return _load(systems[replica], request, (
                    live for live in ledger.live if fleet.replica_of[live.request.request_id] == replica
                ), self.isolated_s)  # fmt: skip

            fleet = Fleet(feed, systems, worlds, load_of, api_server_s, sample_s, look)
            serve(fleet, fleet)
            end_s = fleet.now_s()
        ledger.close()
        values = summary.as_values()
        values["machine"] = self._machine_values(worlds, works, summary.duration_s, kv_shares)
        return SimulationResult(summary=summary, values=values, end_s=end_s)

    def _world(
        self,
        feed: RequestFeed,
        ledger: Ledger,
        until_s: float,
        sample_s: float,
        look: Callable[[float], None],
        on_span: Callable[[StageSpan], None] | None,
        places_itself: bool,
    ) -> tuple[MeasuredSimRuntime, ComputedWork]:
        """A replica, and what it will have computed."""
        config, pipeline, api_server_s = self.config, self.config.pipeline(on_span), self._cost.engine.request_s
        runtime = MeasuredSimRuntime if config.instances is None else InstancesSimRuntime
        truth = PredictedTruth() if config.instances is not None else (
            Truth(self._cost, config.setup.shard_tokens, config.truth, config.seed)
        )
        world = runtime(feed, pipeline, truth, ledger, until_s, sample_s, look, api_server_s, places_itself)
        return world, truth.work

    def _sample(self, now_s: float, ledger: Ledger, memories: Sequence[KVMemory]) -> StateSample:
        config = self.config
        waiting: list[WaitingRequest] = []
        for live in ledger.live:
            if live.first_token_s is None:
                done_s = self.isolated_s(live.num_scheduled_tokens) if live.num_scheduled_tokens else 0.0
                left_s = live.isolated_s - done_s
                until_deadline_s = live.request.arrival_s + config.slo.deadline_s(live.isolated_s) - now_s
                waiting.append(
                    WaitingRequest(
                        request_id=live.request.request_id,
                        length_class=config.classes.of(live.request.num_prompt_tokens),
                        relative_slack=(until_deadline_s - left_s) / live.isolated_s,
                        is_started=live.first_scheduled_s is not None,
                        is_late=until_deadline_s < 0.0,
                    )
                )
        return StateSample(
            now_s=now_s,
            num_ended=ledger.num_ended,
            num_decoding=ledger.num_live - len(waiting),
            waiting=tuple(waiting),
            kv_used_share=None
            if not memories
            else 1.0
            - sum(memory.num_free_blocks for memory in memories)
            / sum(memory.num_blocks * memory.kvp for memory in memories),
        )

    def _machine_values(
        self,
        worlds: Sequence[MeasuredSimRuntime],
        works: Sequence[ComputedWork],
        duration_s: float,
        kv_shares: list[float],
    ) -> dict[str, Any]:
        setup = self.config.setup
        hardware, num_gpus = setup.hardware, setup.layout.world_size * len(worlds)
        kvp = worlds[0].pipeline.kvp
        # By stage, of all replicas.
        busy_s = [
            sum(map(sum, stages)) for stages in zip(*(world.pipeline.busy_s for world in worlds), strict=True)
        ]
        num_lanes = len(busy_s) * kvp * len(worlds)
        active_s = sum(world.active_s for world in worlds)
        # A run that is cut off may have worked on for long after the last token that came out.
        span_s = max(duration_s, 1e-9, *(world.active_s for world in worlds))
        flops = sum(work.flops(setup.shape) for work in works)
        num_bytes = sum(work.num_bytes(setup.shape) for work in works)
        return {
            "num_gpus": num_gpus,
            "num_batches": sum(work.num_batches for work in works),
            "num_tokens_computed": sum(work.num_tokens for work in works),
            "active_share": active_s / len(worlds) / span_s,
            "utilisation": sum(busy_s) / (num_lanes * span_s),
            "utilisation_by_stage": [seconds / (kvp * len(worlds) * span_s) for seconds in busy_s],
            # Of the time with work in the pipeline, what stages and KVP ranks spent waiting.
            "bubbles": 1.0 - sum(busy_s) / (num_lanes / len(worlds) * active_s) if active_s else None,
            "mfu": mfu(flops, hardware, num_gpus, span_s, setup.shape.bytes_per_element),
            "mbu": mbu(num_bytes, hardware, num_gpus, span_s) if works[0].num_params_read else None,
            "kv_used_mean": sum(kv_shares) / len(kv_shares) if kv_shares else None,
            "kv_used_max": max(kv_shares, default=None),
        }


@lru_cache(_MAX_CACHED_ISOLATED)
def _isolated_times(setup: SchedulerSetup, truth: TruthConfig, max_tokens: int) -> IsolatedTimes:
    """TTFT of a prompt alone under a scheduler, by length: the same for any number of replicas and any load."""
    cost = setup.cluster_cost
    return IsolatedTimes(
        lambda: build_system(setup),
        Truth(cost, setup.shard_tokens, truth, seed=0),
        lambda: Pipeline(setup.layout.spp, setup.layout.kvp),
        max_tokens,
        cost.engine.request_s,
    )


def _join(system: SchedulerProtocol, world: MeasuredSimRuntime) -> None:
    if isinstance(system, Scheduler):
        world.wakes_at_s = system.wakes_at_s


def _load(
    system: SchedulerProtocol, request: Request, live: Iterable[LiveRequest], isolated_s: Callable[[int], float]
) -> ReplicaLoad:
    """What the router knows of a replica."""
    if isinstance(system, Scheduler):
        work = take_snapshot(system).work
        prompt_s = system.predicted_work_s(request.num_prompt_tokens, system.num_cached_tokens(request))
        return ReplicaLoad(True, work.prefill_s, prompt_s, work.decode_share)
    # A system that predicts nothing: by the prompts that it has, whole.
    waiting_s = sum(one.isolated_s for one in live if one.first_token_s is None)
    return ReplicaLoad(True, waiting_s, isolated_s(request.num_prompt_tokens), 0.0)
