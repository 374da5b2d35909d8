"""An engine over real ranks: starts their processes, waits until they have loaded, and ends them for certain."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from megatron_medha.cluster.launch import RankProcess
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.runtime import ClusterRuntime, RankLink
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware
from megatron_medha.core.errors import RankError
from megatron_medha.core.fitted_cost import FittedCost
from megatron_medha.engine.engine import Engine, World
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.ports import Observer
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.engine.streams import Streams

_log = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 5.0  # a rank finishes its step first


def cluster_engine(
    *,
    rank_config: RankConfig,
    scheduler_config: SchedulerConfig,
    hardware: Hardware,
    profile: FittedCost | None = None,
    observers: tuple[Observer, ...] = (),
    decision_log: Path | None = None,
) -> Engine:
    """An engine whose world is one rank on this machine; nothing starts before its start().

    rank_config.front_endpoint is filled in here: a socket in a directory of our own.
    """

    @contextmanager
    def open_world(
        inbox: Inbox, streams: Streams, note_loading: Callable[[str, float], None]
    ) -> Iterator[World | None]:
        with tempfile.TemporaryDirectory(prefix="medha-") as directory:
            endpoint = f"ipc://{directory}/front"
            link = RankLink(endpoint)
            ranks = [RankProcess.start(msgspec.structs.replace(rank_config, front_endpoint=endpoint))]
            runtime = ClusterRuntime(link, inbox, streams, lambda: _check(ranks))
            try:
                ready = runtime.wait_until_ready(note_loading)
                yield None if ready is None else World(
                    runtime=runtime,
                    setup=SchedulerSetup(
                        config=scheduler_config,
                        shape=ready.shape,
                        hardware=hardware,
                        profile=profile,
                        layout=rank_config.layout,
                        num_blocks=ready.num_blocks,
                        block_size=ready.block_size,
                    ),
                    stop_token_ids=ready.stop_token_ids,
                    device=ready.device,
                )
            finally:
                runtime.shut_down()
                _end(ranks)
                link.close()

    return Engine(open_world, observers=observers, decision_log=decision_log)


def _check(ranks: list[RankProcess]) -> None:
    for rank in ranks:
        if rank.exit_code is not None:
            raise RankError(f"rank {rank.rank} ended with exit code {rank.exit_code}")


def _end(ranks: list[RankProcess]) -> None:
    deadline_s = time.monotonic() + _SHUTDOWN_TIMEOUT_S
    for rank in ranks:
        if not rank.wait(max(0.1, deadline_s - time.monotonic())):
            _log.warning("rank_killed rank=%d reason=did_not_end", rank.rank)
            rank.kill()
