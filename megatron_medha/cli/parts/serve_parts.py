"""What `medha serve` and the Python API put together: an engine for the configured world, and the service over it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from megatron_medha.cluster.kv_audit import KVAudit
from megatron_medha.cluster.launch_config import LaunchKind
from megatron_medha.cluster.rank_engine import OpenRanks, cluster_engine, local_ranks
from megatron_medha.cluster.remote.attach import attached_ranks
from megatron_medha.cluster.run_timeline import RunTimeline
from megatron_medha.core.ports import EngineClient
from megatron_medha.engine.engine import Engine, ObserverFactory
from megatron_medha.engine.replicas import Replicas
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.options.serve_options import ServeConfig, ServeOptions
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.server.observe.request_log import RequestLog
from megatron_medha.server.observe.tracing import OtelTraces
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.service import Service
from megatron_medha.sim.live import live_engine
from megatron_medha.system.secret_values import child_environment, without_secrets
from megatron_medha.text.sampling_defaults import read_sampling_defaults
from megatron_medha.text.tokenizer import Tokenizer

_TIMELINE_S = 300.0  # from when the model is ready; a busy server writes about 10 MB in that time


def make_engine(config: ServeConfig, watcher: ObserverFactory) -> EngineClient:
    """The engine for ranks or for a simulation; nothing runs before its start()."""
    num_replicas, tracking = config.options.parallel.dp, config.options.tracking
    if num_replicas == 1:
        return _replica(config, 0, watcher, tracking.decision_log, tracking.timeline)
    return Replicas([
        _replica(config, replica, watcher, *(
            # Each replica's decisions replay by themselves: log.jsonl becomes log.0.jsonl, log.1.jsonl, ...
            path and path.with_suffix(f".{replica}{path.suffix}") for path in (tracking.decision_log, tracking.timeline)
        ))
        for replica in range(num_replicas)
    ])  # fmt: skip


def make_service(config: ServeConfig, read_config: Callable[[], ServerConfig] | None = None) -> Service:
    """What HTTP routes and the Python API work with; the tokenizer loads meanwhile, nothing else runs before start().

    read_config: what files and environment say of the server now, for a reload.
    """
    options = config.options
    metrics = Metrics()
    homes = [directory for directory in (options.checkpoint, config.tokenizer) if directory is not None]
    sampling_defaults = read_sampling_defaults(homes if options.server.generation_config == "auto" else ())
    journal = RequestLog(metrics)
    engine = make_engine(config, journal.watch)
    loader = ThreadPoolExecutor(1, "tokenizer")
    tokenizer: Future[Tokenizer] = loader.submit(Tokenizer.load, config.tokenizer)
    loader.shutdown(wait=False)
    return Service(
        engine,
        tokenizer,
        options.server,
        metrics=metrics,
        journal=journal,
        slo=options.slo_classes,
        read_config=read_config,
        traces=OtelTraces(options.tracking.otlp_endpoint) if options.tracking.otlp_endpoint is not None else None,
        sampling_defaults=sampling_defaults,
        isolates_keys=options.kv.is_by_key(options.server),
    )


def model_name_of(config: ServeConfig) -> str:
    """The name the engine will give the model, before it has read the checkpoint."""
    if isinstance(config.world, SchedulerSetup):
        return config.world.shape.name
    directory = Path(config.world.checkpoint).resolve()
    is_iteration = directory.name == "release" or directory.name.startswith("iter_")  # of Megatron's checkpoints
    if directory.suffix == ".gguf":
        return directory.stem
    return directory.parent.name if is_iteration else directory.name


def _replica(
    config: ServeConfig, replica: int, watcher: ObserverFactory, decision_log: Path | None, timeline: Path | None
) -> Engine:
    options = config.options
    if isinstance(config.world, SchedulerSetup):
        watchers = (watcher, KVAudit) if options.kv_audit else (watcher,)
        return live_engine(setup=config.world, watchers=watchers, decision_log=decision_log)
    return cluster_engine(
        rank_config=config.world,
        scheduler_config=config.scheduler,
        hardware=options.hardware,
        profile=config.profile,
        recovery=options.recovery,
        open_ranks=_open_ranks(options, replica),
        watchers=(watcher,),
        decision_log=decision_log,
        open_timeline=None if timeline is None else partial(
            RunTimeline.writing, timeline, config.world.layout, duration_s=_TIMELINE_S
        ),
    )  # fmt: skip


def _open_ranks(options: ServeOptions, replica: int) -> OpenRanks:
    if options.launch.kind is LaunchKind.ATTACH:
        return attached_ranks(options.launch, replica, options.parallel.dp)
    secrets = [secret for secret in (options.server.api_key, options.server.admin_key) if secret is not None]
    return local_ranks(replica, environment=child_environment(secrets))


def public_options(options: ServeOptions) -> dict[str, Any]:
    """The options as plain values, without the keys."""
    values: dict[str, Any] = without_secrets(msgspec.to_builtins(options, enc_hook=str))
    return values
