"""The parts `medha serve` puts together: an engine for the configured world, and options that may be shown."""

from __future__ import annotations

from typing import Any

import msgspec

from megatron_medha.cluster.engine import cluster_engine
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.config import ServeConfig, ServeOptions
from megatron_medha.engine.engine import Engine
from megatron_medha.engine.ports import Observer
from megatron_medha.sim.live import live_engine


def make_engine(config: ServeConfig, observer: Observer) -> Engine:
    """The engine for ranks or for a simulation; nothing runs before its start()."""
    match config.world:
        case RankConfig():
            return cluster_engine(
                rank_config=config.world,
                scheduler_config=config.scheduler,
                hardware=config.hardware,
                profile=config.profile,
                observers=(observer,),
                decision_log=config.tracking.decision_log,
            )
        case model:
            return live_engine(
                shape=model.shape,
                hardware=config.hardware,
                scheduler_config=config.scheduler,
                num_blocks=model.num_blocks,
                block_size=model.block_size,
                observers=(observer,),
                decision_log=config.tracking.decision_log,
            )


def public_options(options: ServeOptions) -> dict[str, Any]:
    """The options as plain values, without the API key."""
    values: dict[str, Any] = msgspec.to_builtins(options, enc_hook=str)
    if values["server"]["api_key"] is not None:
        values["server"]["api_key"] = "***"
    return values
