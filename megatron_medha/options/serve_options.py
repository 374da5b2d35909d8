"""The options of `medha serve`, and the frozen configs of every component that they become, once, at start."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

import msgspec

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.launch_config import LaunchConfig, LaunchKind
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.cost.capacity import check_layout, cluster_for, num_blocks_in
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.fitted_cost import FittedCost
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.errors import CheckpointError, ConfigError, check_member, check_range
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.shards import check_shard_tokens, default_shard_tokens
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.slo import SloConfig
from megatron_medha.sim.baselines.baseline_config import BaselineConfig, check_serves
from megatron_medha.system import machine
from megatron_medha.text.tokenizers.tokenizer_source import find_tokenizer, no_tokenizer

DEFAULT_BLOCK_SIZE = 16  # tokens, on CPU and in simulations; CUDA's backends have their own


class TokenizerMissingError(ConfigError):
    """No tokenizer is where one must be; whether there is a checkpoint, the ranks know."""


class RuntimeKind(Enum):
    """What computes."""

    RANKS = "ranks"
    SIM = "sim"


class LogFormat(Enum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelOptions(ParallelLayout):
    """How many ranks there are on each axis, and how long the KV of one request on one rank may be."""

    max_tokens_per_shard: int | None = None

    def __post_init__(self) -> None:
        ParallelLayout.__post_init__(self)
        check_range("parallel.max_tokens_per_shard", self.max_tokens_per_shard, 1, 1 << 40)

    @property
    def replica(self) -> ParallelLayout:
        """The axes of one replica."""
        return ParallelLayout(tp=self.tp, spp=self.spp, kvp=self.kvp)


_ISOLATIONS = ("auto", "none", "key")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVOptions(KVConfig):
    """The KV memory, and whose requests may find one another's prefixes in it."""

    isolation: str = "auto"  # auto: by key on a public address, where what is cached would tell about others

    def __post_init__(self) -> None:
        KVConfig.__post_init__(self)
        check_member("kv.isolation", self.isolation, _ISOLATIONS)

    @property
    def config(self) -> KVConfig:
        """Without what is the server's."""
        return KVConfig(**{field.name: getattr(self, field.name) for field in fields(KVConfig)})

    def is_by_key(self, server: ServerConfig) -> bool:
        """Whether requests of different keys share no cached prefix."""
        return self.isolation == "key" or (self.isolation == "auto" and not server.is_loopback)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """Empty: a server takes its traffic from its clients."""


_CPU_KV_SHARE = 0.5                 # unless model.kv_memory_share says otherwise
_MAX_WANDB_PROJECT_CHARS = 128     # W&B's limits
_NOT_IN_WANDB_PROJECT = "/\\#?%:"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """What is written down while serving."""

    decision_log: Path | None = None
    metrics_log: Path | None = None
    timeline: Path | None = None
    interval_s: float = 10.0
    wandb_project: str | None = None
    wandb_mode: str = "auto"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: tuple[str, ...] = ()
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        check_member("tracking.wandb_mode", self.wandb_mode, ("auto", "online", "offline"))
        check_range("tracking.interval_s", self.interval_s, 0.1, 86400.0)
        project = "x" if self.wandb_project is None else self.wandb_project
        if not 0 < len(project) <= _MAX_WANDB_PROJECT_CHARS or set(project) & set(_NOT_IN_WANDB_PROJECT):
            raise ConfigError(
                f"tracking.wandb_project={project[:80]}: a project of W&B has 1 to {_MAX_WANDB_PROJECT_CHARS} "
                f"characters, none of {' '.join(_NOT_IN_WANDB_PROJECT)}; null for none"
            )
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"tracking.otlp_endpoint={self.otlp_endpoint}: give an address like http://127.0.0.1:4318/v1/traces"
            )
        taken: dict[Path, str] = {}
        for key in ("decision_log", "metrics_log", "timeline"):
            path: Path | None = getattr(self, key)
            if path is None:
                continue
            if path.is_dir():
                raise ConfigError(f"tracking.{key}={path}: a directory; name a file")
            if path in taken:
                raise ConfigError(f"tracking.{key}={path}: the {taken[path]} goes there; name another")
            taken[path] = key.replace("_", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything a user can say, as conf/serve.yaml lays it out."""

    checkpoint: Path | None
    tokenizer: Path | None = None
    profile: Path | None = None
    runtime: RuntimeKind = RuntimeKind.RANKS
    log_level: str = "info"
    log_format: LogFormat = LogFormat.TEXT
    kv_audit: bool = False
    model: ModelOptions
    parallel: ParallelOptions
    launch: LaunchConfig
    recovery: RecoveryConfig
    kv: KVOptions
    scheduler: BaselineConfig  # refused unless it is our own
    server: ServerConfig
    slo_classes: SloConfig
    hardware: Hardware
    engine: EngineCosts
    workload: WorkloadOptions
    tracking: TrackingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """Everything a user can say to `medha profile`, as conf/profile.yaml lays it out."""

    checkpoint: Path | None
    file: Path
    seconds: float
    model: ModelOptions
    parallel: ParallelOptions
    launch: LaunchConfig

    def __post_init__(self) -> None:
        check_range("seconds", self.seconds, 1.0, 3600.0)
        if self.parallel.world_size > 1:
            raise ConfigError("parallel: a profile is measured on one rank; use parallel=single")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The options of `medha serve`, checked, with what follows from them."""

    options: ServeOptions
    world: RankConfig | SchedulerSetup  # of one replica; SchedulerSetup: steps are simulated
    tokenizer: Path
    scheduler: SchedulerConfig
    profile: FittedCost | None


def serve_config(options: ServeOptions) -> ServeConfig:
    """The options, checked against each other and against this machine. Raises ConfigError."""
    check_member("log_level", options.log_level, ("debug", "info", "warning", "error"))
    check_serves(scheduler := options.scheduler.reduced)
    world: RankConfig | SchedulerSetup
    if options.runtime is RuntimeKind.SIM:
        world = _simulated_setup(options, scheduler)
        if options.tracking.timeline is not None:
            raise ConfigError(
                f"tracking.timeline={options.tracking.timeline}: with runtime=sim no rank runs; `medha simulate` "
                "writes a timeline of simulated ones"
            )
    else:
        world = rank_config(options)
        if options.tokenizer is not None:
            world = msgspec.structs.replace(world, tokenizer=str(_tokenizer(options)))
    return ServeConfig(
        options=options,
        world=world,
        tokenizer=_tokenizer(options),
        scheduler=scheduler,
        profile=_profile(options.profile, options.parallel.replica),
    )


def rank_config(options: ServeOptions | ProfileOptions) -> RankConfig:
    """The configuration of the ranks that serve this checkpoint. Raises ConfigError."""
    model = options.model
    if model.shape is not None:
        raise ConfigError(
            f"model.shape.name={model.shape.name}: with runtime=ranks the checkpoint says what the model is; "
            "use model=auto, or runtime=sim to simulate this one"
        )
    checkpoint = checkpoint_path(options.checkpoint)
    parallel = options.parallel
    device = model.device if model.device != "auto" else ("cuda" if machine.has_cuda_device() else "cpu")
    if parallel.kvp > 1 and parallel.max_tokens_per_shard is None and device == "cuda" and model.kv_memory_gib is None:
        raise ConfigError(
            f"parallel.max_tokens_per_shard=null: parallel.kvp={parallel.kvp} ranks share a request's KV by token "
            "range, and how many fit on a GPU may differ after a restart; give this, e.g. 32768, or model.kv_memory_gib"
        )
    block_size = model.block_size or DEFAULT_BLOCK_SIZE  # larger ones, of CUDA's backends, are checked by the rank
    kv = options.kv.config if isinstance(options, ServeOptions) else NO_PREFIX_CACHE
    scheduler = options.scheduler.reduced if isinstance(options, ServeOptions) else SchedulerConfig()
    _check_shards(parallel, kv, block_size)
    return RankConfig(
        layout=parallel.replica,
        server_endpoint="",
        checkpoint=str(checkpoint),
        model=replace(model, device=device, num_threads=_num_threads(options)),
        kv_memory_bytes=_kv_memory_bytes(options, checkpoint, device),
        max_batch_tokens=scheduler.max_batch_tokens,
        max_tokens_per_shard=parallel.max_tokens_per_shard,
        kv=kv,
        is_audited=isinstance(options, ServeOptions) and options.kv_audit,
    )


def _check_shards(parallel: ParallelOptions, kv: KVConfig, block_size: int) -> None:
    check_shard_tokens(parallel.max_tokens_per_shard, kv, block_size, "model.block_size")


def _kv_memory_bytes(options: ServeOptions | ProfileOptions, checkpoint: Path, device: str) -> int | None:
    """Of each rank; ranks of this machine share its memory. None: a share of the GPU's, once the weights are on it."""
    model, parallel = options.model, options.parallel
    wanted_bytes = None if model.kv_memory_gib is None else int(model.kv_memory_gib * machine.GIB)
    if device == "cuda":
        return wanted_bytes
    if options.launch.kind is LaunchKind.ATTACH:
        if wanted_bytes is None:
            raise ConfigError(
                "model.kv_memory_gib=null: what is free where the ranks will run is not known here; give GiB per rank"
            )
        return wanted_bytes
    free_bytes = machine.free_memory_bytes()
    if wanted_bytes is not None:
        if free_bytes is not None and wanted_bytes * parallel.world_size > free_bytes:
            ranks = f" on each of {parallel.world_size} ranks" if parallel.world_size > 1 else ""
            raise ConfigError(
                f"model.kv_memory_gib={model.kv_memory_gib:g}{ranks}: only {free_bytes / machine.GIB:.1f} GiB are "
                "free; take less, or null for a share of what is free"
            )
        return wanted_bytes
    if free_bytes is None:
        raise ConfigError("model.kv_memory_gib=null: this system does not tell how much memory is free; give a number")
    # tp and spp cut the weights, kvp and dp repeat them.
    num_copies = parallel.kvp * parallel.dp
    weight_bytes = machine.directory_bytes(checkpoint) * num_copies
    kv_bytes = int((free_bytes - weight_bytes) * (model.kv_memory_share or _CPU_KV_SHARE))
    if kv_bytes <= 0:
        times = f", {num_copies} times," if num_copies > 1 else ""
        raise ConfigError(
            f"checkpoint={checkpoint}: {weight_bytes / machine.GIB:.1f} GiB of files{times} but only "
            f"{free_bytes / machine.GIB:.1f} GiB of memory are free; free some, or give model.kv_memory_gib"
        )
    return kv_bytes // parallel.world_size


def _num_threads(options: ServeOptions | ProfileOptions) -> int | None:
    """Of each rank: several on one machine share its cores, one takes them all."""
    if options.model.num_threads is not None or options.launch.kind is LaunchKind.ATTACH:
        return options.model.num_threads
    num_ranks = options.parallel.world_size
    return None if num_ranks == 1 else max(1, machine.num_usable_cores() // num_ranks)


def _simulated_setup(options: ServeOptions, scheduler: SchedulerConfig) -> SchedulerSetup:
    model = options.model
    if (shape := model.simulated_shape) is None:
        raise ConfigError(
            "model.shape=null: runtime=sim needs the sizes of the model to simulate; use model=llama3_8b, "
            "or an option of your own with --config-dir"
        )
    layout = options.parallel.replica
    hardware = cluster_for(options.hardware, layout)
    check_layout(shape, hardware, layout)
    if model.max_context_len is not None:
        check_range("model.max_context_len", model.max_context_len, 2, shape.max_context_len)
        shape = replace(shape, max_context_len=model.max_context_len)
    if model.kv_memory_gib is None:
        raise ConfigError("model.kv_memory_gib=null: runtime=sim needs the KV memory to simulate; give GiB")
    block_size = model.block_size or DEFAULT_BLOCK_SIZE
    kv = options.kv.config
    _check_shards(options.parallel, kv, block_size)
    num_blocks = num_blocks_in(shape, layout, model.kv_memory_gib, block_size)
    return SchedulerSetup(
        config=scheduler,
        shape=shape,
        hardware=hardware,
        engine=options.engine,
        layout=layout,
        num_blocks=num_blocks,
        block_size=block_size,
        max_tokens_per_shard=options.parallel.max_tokens_per_shard
        or default_shard_tokens(num_blocks, block_size, shape.max_context_len, layout.kvp, kv),
        kv=kv,
        step_sizes=options.engine.step_sizes(layout),
    )


def _profile(path: Path | None, layout: ParallelLayout) -> FittedCost | None:
    if path is None:
        return None
    if layout.world_size > 1:
        raise ConfigError(f"profile={path}: measured on one rank; leave it out with several")
    try:
        return msgspec.json.decode(path.expanduser().read_bytes(), type=FittedCost)
    except OSError as error:
        raise ConfigError(f"profile={path}: {error.strerror}; `medha profile` writes one") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"profile={path}: not a profile ({error}); `medha profile` writes one") from None


def checkpoint_path(given: Path | None) -> Path:
    """What a user named, found. Raises ConfigError."""
    example = "`medha fetch-model` downloads a small one, `medha train-tiny` makes one in checkpoints/tiny"
    if given is None:
        raise ConfigError(
            f"checkpoint is missing; give checkpoint=DIR, Megatron or Hugging Face, or a GGUF file; {example}"
        )
    directory = given.expanduser()
    if not directory.is_dir() and not (directory.is_file() and directory.suffix == ".gguf"):
        what = "a file, neither a directory nor *.gguf" if directory.exists() else "no such directory"
        raise ConfigError(f"checkpoint={given}: {what}; {example}")
    return directory


def _tokenizer(options: ServeOptions) -> Path:
    key, directory = "tokenizer", options.tokenizer
    if directory is None:
        key, directory = "checkpoint", options.checkpoint
    if directory is None:
        raise ConfigError("tokenizer=null: without a checkpoint it must name a directory with one")
    directory = directory.expanduser()
    try:
        problem = no_tokenizer(directory) if find_tokenizer(directory) is None else None
    except CheckpointError as error:
        problem = str(error)
    if problem is not None:
        raise TokenizerMissingError(f"{key}={directory}: {problem}")
    return directory
