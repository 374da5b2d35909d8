"""An engine over the real ranks of one replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import zmq

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.kv_audit import KVAudit
from megatron_medha.cluster.launch import WORKER_COMMAND, LocalRanks, Ranks
from megatron_medha.cluster.messages import StepDone
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.run_timeline import RunTimeline
from megatron_medha.cluster.runtime import ClusterRuntime
from megatron_medha.core.cost.fitted_cost import FittedCost
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.overtaking import resolved
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.engine import Engine, EngineBackend, ObserverFactory
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.request_states import RequestStates
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.engine.status_board import StatusBoard
from megatron_medha.system.scratch import scratch_directory

OpenRanks = Callable[[Sequence[RankConfig]], AbstractContextManager[Ranks]]
OpenTimeline = Callable[[float], AbstractContextManager[RunTimeline]]  # given the present moment


def local_ranks(
    replica: int = 0, command: Sequence[str] = WORKER_COMMAND, environment: Mapping[str, str] | None = None
) -> OpenRanks:
    """Ranks that are processes on this machine; the replica's place tells which devices are theirs.

    environment: of the processes; None: ours without what looks like a secret.
    """

    @contextmanager
    def open_ranks(configs: Sequence[RankConfig]) -> Iterator[Ranks]:
        with scratch_directory() as directory, zmq.Context() as context:
            yield LocalRanks(
                configs, context, directory, first_local_rank=replica * len(configs), command=command,
                environment=environment,
            )  # fmt: skip

    return open_ranks


def cluster_engine(
    *,
    rank_config: RankConfig,
    scheduler_config: SchedulerConfig,
    hardware: Hardware,
    profile: FittedCost | None = None,
    recovery: RecoveryConfig | None = None,
    open_ranks: OpenRanks | None = None,
    watchers: tuple[ObserverFactory, ...] = (),
    decision_log: Path | None = None,
    open_timeline: OpenTimeline | None = None,
) -> Engine:
    """An engine whose world is one replica; nothing starts before its start().

    rank_config: of any rank; its number and addresses are filled in here. open_ranks: by default on this machine.
    open_timeline: None: none is written.
    """
    layout = rank_config.layout
    configs = [msgspec.structs.replace(rank_config, rank=rank) for rank in range(layout.world_size)]

    @contextmanager
    def open_backend(inbox: Inbox, streams: RequestStates, board: StatusBoard) -> Iterator[EngineBackend | None]:
        with ExitStack() as stack:
            ranks = stack.enter_context((open_ranks or local_ranks())(configs))
            runtime = ClusterRuntime(ranks, layout, inbox, streams, board, recovery or RecoveryConfig())
            try:
                started = runtime.start()
                watchers: list[ObserverFactory] = []
                if started is not None and open_timeline is not None:
                    timeline = stack.enter_context(open_timeline(runtime.now_s()))
                    runtime.on_step.append(timeline.step_done)
                    watchers.append(lambda scheduler: timeline)
                if rank_config.is_audited:
                    watchers.append(partial(_audited, runtime, layout, stack))
                yield None if started is None else EngineBackend(
                    runtime=runtime,
                    setup=SchedulerSetup(
                        config=resolved(scheduler_config, started.can_hold),
                        shape=started.first.shape,
                        hardware=hardware,
                        profile=profile,
                        layout=layout,
                        num_blocks=started.num_blocks,
                        block_size=started.first.block_size,
                        max_tokens_per_shard=started.first.shard_tokens,
                        kv=rank_config.kv,
                        step_sizes=started.first.step_sizes,
                    ),
                    stop_token_ids=started.first.stop_token_ids,
                    device=started.device,
                    watchers=tuple(watchers),
                )
            finally:
                runtime.shut_down()

    return Engine(open_backend, watchers=watchers, decision_log=decision_log)


def _audited(runtime: ClusterRuntime, layout: ParallelLayout, stack: ExitStack, scheduler: Scheduler) -> KVAudit:
    """An audit of the scheduler and of the ranks' answers; it reports when the stack closes."""
    audit = KVAudit(scheduler)

    def answered(done: StepDone, now_s: float) -> None:
        audit.answered(done.batch_id, layout.coord_of(done.rank).kvp, done.audit_counts)

    runtime.on_step.append(answered)
    stack.callback(audit.report)
    return audit
