"""The options of `medha simulate`, and the simulation they become. Hydra is not needed to read this."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.cost.capacity import MemoryBudget, check_layout, cluster_for, num_blocks_in, num_kv_blocks
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.errors import ConfigError, check_range
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.shards import check_shard_tokens, default_shard_tokens
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.options.serve_options import DEFAULT_BLOCK_SIZE, ParallelOptions, TrackingConfig
from megatron_medha.sim.baselines.baseline_config import BaselineConfig
from megatron_medha.sim.run_directory import RecordConfig
from megatron_medha.sim.simulation import SimulationConfig
from megatron_medha.sim.system import InstancesSetup, SystemConfig, SystemKind, build_system
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.workload import WorkloadConfig

# Prompts longer than what a model was trained for cost what they cost: a simulation is bound by KV memory alone.
_NO_CONTEXT_LIMIT = 1 << 40


class SchedulerCostModel(Enum):
    """What the scheduler goes by."""

    EXACT = "exact"    # the cost model the world is made from, but for the world's bias and noise
    ONLINE = "online"  # the same as a start, corrected by every step, as `medha serve` does


class Plots(Enum):
    """Whether plots are drawn."""

    AUTO = "auto"      # if matplotlib is installed
    ALWAYS = "always"
    NEVER = "never"


class RequestsFormat(Enum):
    """How the requests are written down."""

    JSONL = "jsonl"
    PARQUET = "parquet"  # beside the JSON lines; needs pyarrow


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """What of a GPU's memory may be used."""

    utilisation: float = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSystem:
    """The options that `medha simulate` and `medha plan` share."""

    seed: int = 0
    model: ModelOptions
    system: SystemConfig = SystemConfig()
    kv: KVConfig
    scheduler: BaselineConfig
    hardware: Hardware
    engine: EngineCosts
    workload: WorkloadConfig
    slo: Slo
    classes: LengthClasses
    truth: TruthConfig
    memory: MemoryOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions(SimulatedSystem):
    """Everything a user can say, as conf/simulate.yaml lays it out."""

    out: Path | None = None
    belief: SchedulerCostModel = SchedulerCostModel.EXACT
    max_drain_s: float | None = None
    plots: Plots = Plots.AUTO
    requests: RequestsFormat = RequestsFormat.JSONL
    parallel: ParallelOptions
    record: RecordConfig
    tracking: TrackingConfig = TrackingConfig()
    objective: str = "all.goodput_per_s"

    def __post_init__(self) -> None:
        check_range("max_drain_s", self.max_drain_s, 0.0, 1e9)


def simulation_config(options: SimulateOptions) -> SimulationConfig:
    """The options, checked against each other. Raises ConfigError."""
    setup = scheduler_setup(options)
    return SimulationConfig(
        setup=setup,
        instances=None if options.system.kind is SystemKind.MEDHA else _instances_setup(options, setup),
        workload=options.workload,
        slo=options.slo,
        classes=options.classes,
        truth=options.truth,
        seed=options.seed,
        max_drain_s=options.max_drain_s,
        sample_s=options.record.sample_s,
    )


def scheduler_setup(options: SimulateOptions) -> SchedulerSetup:
    """The system under test on the machine that is simulated."""
    model, layout = options.model, options.parallel.replica
    if (shape := model.simulated_shape) is None:
        raise ConfigError("model.shape=null: a simulation needs the sizes of a model; use model=llama3_8b, or an "
            "option of your own with --config-dir")
    if (dp := options.parallel.dp) > 1:
        raise ConfigError(f"parallel.dp={dp}: replicas do not influence each other; simulate one of them with "
            f"its share of the load, workload.qps / {dp}")
    hardware = cluster_for(options.hardware, layout)
    num_blocks, block_size = _num_blocks(options, shape, hardware, layout), model.block_size or DEFAULT_BLOCK_SIZE
    shard_tokens = options.parallel.max_tokens_per_shard
    check_shard_tokens(shard_tokens, options.kv, block_size, "model.block_size")
    if shard_tokens is None and layout.kvp > 1:
        shard_tokens = default_shard_tokens(num_blocks, block_size, None, layout.kvp, options.kv)
    setup = SchedulerSetup(
        config=options.scheduler.reduced,
        shape=replace(shape, max_context_len=model.max_context_len or _NO_CONTEXT_LIMIT),
        hardware=hardware,
        engine=options.engine,
        layout=layout,
        num_blocks=num_blocks,
        block_size=block_size,
        max_tokens_per_shard=shard_tokens,
        kv=options.kv,
        step_sizes=options.engine.step_sizes(layout),
        learns=options.belief is SchedulerCostModel.ONLINE,
    )
    build_system(setup)  # raises what a run would raise later
    return setup


def _instances_setup(options: SimulateOptions, setup: SchedulerSetup) -> InstancesSetup:
    """The GPUs of the layout, cut into instances. Raises ConfigError for whatever has no meaning there."""
    config, num_gpus, hardware = options.system, setup.layout.world_size, setup.hardware
    name, tp = config.kind.value, config.instance_tp
    if num_gpus % tp:
        raise ConfigError(
            f"system.instance_tp={tp} must divide the {num_gpus} GPUs of parallel.tp={setup.layout.tp} "
            f"parallel.spp={setup.layout.spp} parallel.kvp={setup.layout.kvp}, which it cuts into instances"
        )
    if tp > hardware.devices_per_node:
        raise ConfigError(
            f"system.instance_tp={tp}: a node of {hardware.name} has {hardware.devices_per_node} GPUs, and an "
            "instance does not leave its node"
        )
    if options.parallel.max_tokens_per_shard is not None:
        raise ConfigError(
            f"parallel.max_tokens_per_shard={options.parallel.max_tokens_per_shard}: system.kind={name} places KV by "
            "rules of its own; leave it null"
        )
    if options.belief is SchedulerCostModel.ONLINE:
        raise ConfigError(f"belief=online: system.kind={name} is given exact predictions; use belief=exact")
    if options.truth != TruthConfig():
        raise ConfigError(
            f"truth: system.kind={name} is given exact predictions, so the world cannot differ from them; "
            "use truth=exact, or system=medha"
        )
    if options.record.decision_log:
        raise ConfigError(
            f"record.decision_log=true: only our scheduler's decisions can be explained and replayed, "
            f"not those of system.kind={name}; use record=standard"
        )
    instances = InstancesSetup(
        config=config,
        shape=setup.shape,
        hardware=hardware,
        engine=options.engine,
        num_instances=num_gpus // tp,
        tokens_per_instance=_num_blocks(options, setup.shape, hardware, ParallelLayout(tp=tp)) * setup.block_size,
    )
    build_system(instances)  # raises what a run would raise later
    return instances


def _num_blocks(options: SimulateOptions, shape: ModelShape, hardware: Hardware, layout: ParallelLayout) -> int:
    """KV blocks of one KVP rank. A block is spread over the rank's stages and KV heads; the fullest stage decides."""
    model = options.model
    if model.kv_memory_gib is None:
        reserve = MemoryBudget(
            block_size=model.block_size or DEFAULT_BLOCK_SIZE,
            utilisation=options.memory.utilisation,
            max_batch_tokens=options.scheduler.max_batch_tokens,
            max_num_sequences=options.scheduler.max_num_sequences,
        )
        return num_kv_blocks(shape, hardware, layout, reserve)
    check_layout(shape, hardware, layout)
    return num_blocks_in(shape, layout, model.kv_memory_gib, model.block_size or DEFAULT_BLOCK_SIZE)
