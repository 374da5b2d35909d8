"""The parts `medha serve` puts together: an engine for the configured world, and options that may be shown."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from megatron_medha.cluster.kv_audit import KVAudit
from megatron_medha.cluster.launch_config import LaunchKind
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.rank_engine import OpenRanks, OpenTimeline, cluster_engine, local_ranks
from megatron_medha.cluster.remote.attach import attached_ranks
from megatron_medha.cluster.run_timeline import RunTimeline
from megatron_medha.core.ports import EngineClient
from megatron_medha.engine.engine import Engine, ObserverFactory
from megatron_medha.engine.replicas import Replicas
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.options.serve_options import ServeConfig, ServeOptions
from megatron_medha.sim.live import live_engine
from megatron_medha.system.child_environment import child_environment
from megatron_medha.system.secret_values import without_secrets

_TIMELINE_S = 300.0  # from when the model is ready; a busy server writes about 10 MB in that time


def make_engine(config: ServeConfig, watcher: ObserverFactory) -> EngineClient:
    """The engine for ranks or for a simulation; nothing runs before its start()."""
    num_replicas = config.num_replicas
    if num_replicas == 1:
        return _replica(config, 0, watcher, config.tracking.decision_log, config.tracking.timeline)
    return Replicas(
        [
            _replica(
                config,
                replica,
                watcher,
                _log_of_replica(config.tracking.decision_log, replica),
                _log_of_replica(config.tracking.timeline, replica),
            )
            for replica in range(num_replicas)
        ]
    )


def model_name_of(config: ServeConfig) -> str:
    """The name the engine will give the model, before it has read the checkpoint."""
    if not isinstance(config.world, RankConfig):
        return config.world.shape.name
    directory = Path(config.world.checkpoint).resolve()
    is_iteration = directory.name == "release" or directory.name.startswith("iter_")  # of Megatron's checkpoints
    return directory.parent.name if is_iteration else directory.name


def _replica(
    config: ServeConfig, replica: int, watcher: ObserverFactory, decision_log: Path | None, timeline: Path | None
) -> Engine:
    match config.world:
        case RankConfig():
            return cluster_engine(
                rank_config=config.world,
                scheduler_config=config.scheduler,
                hardware=config.hardware,
                profile=config.profile,
                recovery=config.recovery,
                open_ranks=_open_ranks(config, replica),
                watchers=(watcher,),
                decision_log=decision_log,
                open_timeline=_open_timeline(config, timeline),
            )
        case model:
            return live_engine(
                setup=SchedulerSetup(
                    config=config.scheduler,
                    shape=model.shape,
                    hardware=model.hardware,
                    engine=model.engine,
                    layout=model.layout,
                    num_blocks=model.num_blocks,
                    block_size=model.block_size,
                    max_tokens_per_shard=model.max_tokens_per_shard,
                ),
                watchers=(watcher, KVAudit) if model.is_audited else (watcher,),
                decision_log=decision_log,
            )


def _open_ranks(config: ServeConfig, replica: int) -> OpenRanks:
    if config.launch.kind is LaunchKind.ATTACH:
        return attached_ranks(config.launch, replica, config.num_replicas)
    secrets = [secret for secret in (config.server.api_key, config.server.admin_key) if secret is not None]
    return local_ranks(replica, environment=child_environment(secrets))


def _open_timeline(config: ServeConfig, path: Path | None) -> OpenTimeline | None:
    if path is None:
        return None
    assert isinstance(config.world, RankConfig)
    return partial(RunTimeline.writing, path, config.world.layout, duration_s=_TIMELINE_S)


def _log_of_replica(path: Path | None, replica: int) -> Path | None:
    """Each replica's decisions replay by themselves: log.jsonl becomes log.0.jsonl, log.1.jsonl, ..."""
    return None if path is None else path.with_suffix(f".{replica}{path.suffix}")


def public_options(options: ServeOptions) -> dict[str, Any]:
    """The options as plain values, without the keys."""
    values: dict[str, Any] = without_secrets(msgspec.to_builtins(options, enc_hook=str))
    return values
