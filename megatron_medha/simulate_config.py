"""The options of `medha simulate`, and the simulation they become. Hydra is not needed to read this."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from megatron_medha.cluster.machine import GIB
from megatron_medha.config import DEFAULT_BLOCK_SIZE, ModelOptions, ParallelOptions, TrackingConfig
from megatron_medha.core.capacity import Reserve, check_layout, num_kv_blocks
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.engine_costs import EngineCosts
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.hardware import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.engine.outcome import Slo
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.engine.summary import LengthClasses
from megatron_medha.engine.workload import WorkloadConfig
from megatron_medha.sim.run_directory import RecordConfig
from megatron_medha.sim.simulation import SimulationConfig
from megatron_medha.sim.truth import TruthConfig

# Prompts longer than what a model was trained for cost what they cost: a simulation is bound by KV memory alone.
_NO_CONTEXT_LIMIT = 1 << 40


class Belief(Enum):
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
class SimulateOptions:
    """Everything a user can say, as conf/simulate.yaml lays it out."""

    out: Path | None = None
    seed: int = 0
    belief: Belief = Belief.EXACT
    max_drain_s: float | None = None
    plots: Plots = Plots.AUTO
    requests: RequestsFormat = RequestsFormat.JSONL
    model: ModelOptions
    parallel: ParallelOptions
    scheduler: SchedulerConfig
    hardware: Hardware
    engine: EngineCosts
    workload: WorkloadConfig
    slo: Slo
    classes: LengthClasses
    truth: TruthConfig
    memory: MemoryOptions
    record: RecordConfig
    tracking: TrackingConfig = TrackingConfig()
    objective: str = "all.goodput_per_s"


def simulation_config(options: SimulateOptions) -> SimulationConfig:
    """The options, checked against each other. Raises ConfigError."""
    if options.max_drain_s is not None and options.max_drain_s < 0.0:
        raise ConfigError(f"max_drain_s={options.max_drain_s:g}: must not be negative")
    return SimulationConfig(
        setup=scheduler_setup(options),
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
    if model.shape is None:
        raise ConfigError("model.shape=null: a simulation needs the sizes of a model; use model=llama3_8b, or an "
            "option of your own with --config-dir")
    if (dp := options.parallel.dp) > 1:
        raise ConfigError(f"parallel.dp={dp}: replicas do not influence each other; simulate one of them with "
            f"its share of the load, workload.qps / {dp}")
    hardware = cluster_for(options.hardware, layout)
    setup = SchedulerSetup(
        config=options.scheduler,
        shape=replace(model.shape, max_context_len=model.max_context_len or _NO_CONTEXT_LIMIT),
        hardware=hardware,
        engine=options.engine,
        layout=layout,
        num_blocks=_num_blocks(options, model.shape, hardware),
        block_size=model.block_size or DEFAULT_BLOCK_SIZE,
        max_tokens_per_shard=options.parallel.max_tokens_per_shard,
        learns=options.belief is Belief.ONLINE,
    )
    setup.build()  # whoever cannot be built says so now
    return setup


def _num_blocks(options: SimulateOptions, shape: ModelShape, hardware: Hardware) -> int:
    """KV blocks of one KVP rank. A block is spread over the rank's stages and KV heads; the fullest stage decides."""
    model, layout = options.model, options.parallel.replica
    if model.kv_memory_gib is None:
        reserve = Reserve(
            block_size=model.block_size or DEFAULT_BLOCK_SIZE,
            utilisation=options.memory.utilisation,
            max_batch_tokens=options.scheduler.max_batch_tokens,
            max_num_sequences=options.scheduler.max_num_sequences,
        )
        return num_kv_blocks(shape, hardware, layout, reserve)
    check_layout(shape, hardware, layout)
    num_layers = max(shape.num_stage_layers(stage, layout.spp) for stage in range(layout.spp))
    share = num_layers / shape.num_layers / min(layout.tp, shape.num_kv_heads)
    block_size = model.block_size or DEFAULT_BLOCK_SIZE
    block_bytes = block_size * shape.kv_bytes_per_token * share
    num_blocks = int(model.kv_memory_gib * GIB / block_bytes)
    if num_blocks < 1:
        raise ConfigError(
            f"model.kv_memory_gib={model.kv_memory_gib:g}: too small for one block of {block_size} tokens, "
            f"which takes {block_bytes / GIB:.2g} GiB on each GPU"
        )
    return num_blocks


def cluster_for(hardware: Hardware, layout: ParallelLayout) -> Hardware:
    """A single device (hardware=a100) stands for as many as the layout needs; a cluster (a100_x16) is what it is."""
    return replace(hardware, num_devices=layout.world_size) if hardware.num_devices == 1 else hardware
