"""The parts `medha serve` puts together: an engine for the configured world, and options that may be shown."""

from __future__ import annotations

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
from megatron_medha.sim.live import live_engine
from megatron_medha.system.secret_values import child_environment, without_secrets

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
