"""Which system decides in a simulation, or in its replay: where a configuration becomes a SchedulerProtocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.errors import ConfigError, check_ranges
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import SchedulerProtocol
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.baselines.baseline_config import BASELINE_POLICIES, BaselineConfig
from megatron_medha.sim.baselines.elastic import ElasticSystem, Filling
from megatron_medha.sim.baselines.pools import ReservedPools
from megatron_medha.sim.baselines.predicted_order import PredictedOrder
from megatron_medha.sim.baselines.prefill_limits import PartialPrefillLimits
from megatron_medha.sim.baselines.ring_cost import RingCost
from megatron_medha.sim.baselines.static import StaticSystem
from megatron_medha.sim.held_batches import InterruptiblePipeline
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.stats.timeline import StageSpan


class SystemKind(Enum):
    """Who decides."""

    MEDHA = "medha"      # the server's own scheduler, whatever its policy
    ELASTIC = "elastic"  # LoongServe-like: whole prompts, each on as many instances as its batch is given
    STATIC = "static"    # every prompt on all instances


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """The system under test. All but `kind` is read by systems of instances only."""

    kind: SystemKind = SystemKind.MEDHA
    instance_tp: int = 2             # GPUs of one instance, cut by tensor parallelism
    filling: Filling = Filling.IDLE  # what may start while a prefill runs; kind=elastic
    num_reserved: int = 0            # instances of a pool of their own for short prompts; kind=elastic
    short_prompt_tokens: int = 8191  # prompts up to here go there

    def __post_init__(self) -> None:
        check_ranges("system", self, 1, 1 << 10, "instance_tp")
        check_ranges("system", self, 0, 1 << 20, "num_reserved")
        check_ranges("system", self, 1, 1 << 40, "short_prompt_tokens")
        if self.num_reserved and self.kind is not SystemKind.ELASTIC:
            raise ConfigError(
                f"system.num_reserved={self.num_reserved}: only system.kind=elastic has pools; "
                "for our scheduler there is scheduler.reserved_share"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancesSetup:
    """A system of instances on a machine: each holds the whole model on `instance_tp` GPUs."""

    config: SystemConfig
    shape: ModelShape
    hardware: Hardware
    engine: EngineCosts
    num_instances: int
    tokens_per_instance: int  # of KV

    def __post_init__(self) -> None:
        assert self.config.kind is not SystemKind.MEDHA, "the scheduler has a setup of its own"
        if self.config.num_reserved >= self.num_instances:
            raise ConfigError(
                f"system.num_reserved={self.config.num_reserved}: there are {self.num_instances} instances, and one "
                "at least must be left for long prompts; give it more GPUs (parallel.tp, parallel.spp)"
            )

    @property
    def max_request_tokens(self) -> int:
        """KV of one request: a long prompt may have all instances that are not reserved."""
        return (self.num_instances - self.config.num_reserved) * self.tokens_per_instance

    @property
    def cost(self) -> RingCost:
        """Of rings of instances."""
        tp = self.config.instance_tp
        layout = ParallelLayout(tp=tp)
        instance = ClusterCost(shape=self.shape, hardware=self.hardware, engine=self.engine, layout=layout)
        return RingCost(instance=instance, shape=self.shape, hardware=self.hardware, tp=tp)


def recorded_setup(header: dict[str, Any]) -> SchedulerSetup:
    """What a decision log was recorded under, ours or a baseline; build_scheduler() makes it. Raises ConfigError."""
    return SchedulerSetup.from_header(header, BaselineConfig)


def build_scheduler(setup: SchedulerSetup) -> Scheduler:
    """Our scheduler, or what it becomes with the policy and the limits of a baseline."""
    config = setup.config
    if not isinstance(config, BaselineConfig):
        return setup.build()
    limits = PartialPrefillLimits(config) if config.has_limits else None
    if config.policy not in BASELINE_POLICIES:
        return setup.build(limits=limits)
    order = PredictedOrder(config)
    order.scheduler = scheduler = setup.build(order.policy, limits)
    return scheduler


def build_system(setup: SchedulerSetup | InstancesSetup) -> SchedulerProtocol:
    """The system under test, which has seen nothing yet."""
    if isinstance(setup, SchedulerSetup):
        return build_scheduler(setup)
    config, cost, ids = setup.config, setup.cost, count()
    instances, num_tokens = tuple(range(setup.num_instances)), setup.tokens_per_instance
    if config.kind is SystemKind.STATIC:
        return StaticSystem(instances, num_tokens, cost, ids)
    if not config.num_reserved:
        return ElasticSystem(instances, num_tokens, cost, ids, config.filling)
    short, long = (
        ElasticSystem(members, num_tokens, cost, ids, config.filling)
        for members in (instances[: config.num_reserved], instances[config.num_reserved :])
    )
    return ReservedPools(short, long, config.short_prompt_tokens)


def pipeline_for(setup: SchedulerSetup, on_span: Callable[[StageSpan], None] | None = None) -> Pipeline:
    """The stages and KVP ranks of one replica; its batches may be held if its scheduler is interruptible."""
    layout = setup.layout
    if setup.config.interruptible is not True:
        return Pipeline(layout.spp, layout.kvp, on_span)
    num_layers = tuple([setup.shape.num_stage_layers(stage, layout.spp) for stage in range(layout.spp)])
    return InterruptiblePipeline(layout.spp, layout.kvp, on_span, num_layers, setup.cluster_cost.switch_s)
