"""The options of `medha simulate`, and the simulation they become. Hydra is not needed to read this."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from megatron_medha.cluster.machine import GIB
from megatron_medha.config import ModelOptions
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
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
class SimulateOptions:
    """Everything a user can say, as conf/simulate.yaml lays it out."""

    out: Path | None = None
    seed: int = 0
    belief: Belief = Belief.EXACT
    max_tokens_per_shard: int | None = None
    max_drain_s: float | None = None
    plots: Plots = Plots.AUTO
    requests: RequestsFormat = RequestsFormat.JSONL
    model: ModelOptions
    parallel: ParallelLayout
    scheduler: SchedulerConfig
    hardware: Hardware
    workload: WorkloadConfig
    slo: Slo
    classes: LengthClasses
    truth: TruthConfig
    record: RecordConfig


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
    model, layout = options.model, options.parallel
    if model.shape is None:
        raise ConfigError("model.shape=null: a simulation needs the sizes of a model; use model=llama3_8b, or an "
            "option of your own with --config-dir")
    if layout.dp > 1:
        raise ConfigError(f"parallel.dp={layout.dp}: replicas do not influence each other; simulate one of them with "
            f"its share of the load, workload.qps / {layout.dp}")
    if layout.spp > model.shape.num_layers:
        raise ConfigError(f"parallel.spp={layout.spp}: more stages than the {model.shape.num_layers} layers of "
            f"{model.shape.name}; at most {model.shape.num_layers}")
    if model.shape.num_heads % layout.tp:
        raise ConfigError(f"parallel.tp={layout.tp} must divide model.shape.num_heads={model.shape.num_heads}")
    if model.kv_memory_gib is None:
        raise ConfigError("model.kv_memory_gib=null: a simulation needs the KV memory of one GPU; give GiB")
    # Every GPU holds its stage's layers of its share of the KV heads; more ranks than KV heads hold copies.
    num_parts = min(layout.tp, model.shape.num_kv_heads) * layout.spp
    block_bytes = model.block_size * model.shape.kv_bytes_per_token / num_parts
    num_blocks = int(model.kv_memory_gib * GIB / block_bytes)
    if num_blocks < 1:
        raise ConfigError(
            f"model.kv_memory_gib={model.kv_memory_gib:g}: too small for one block of {model.block_size} tokens, "
            f"which takes {block_bytes / GIB:.2g} GiB on each GPU"
        )
    return SchedulerSetup(
        config=options.scheduler,
        shape=replace(model.shape, max_context_len=model.max_context_len or _NO_CONTEXT_LIMIT),
        hardware=options.hardware,
        layout=layout,
        num_blocks=num_blocks,
        block_size=model.block_size,
        max_tokens_per_shard=options.max_tokens_per_shard,
        learns=options.belief is Belief.ONLINE,
    )
