"""The ranks' starts: the first one, and others after they are lost, unless that happens too often."""

from __future__ import annotations

import logging
from enum import Enum

import zmq

from megatron_medha.cluster.health import LOAD_HEARTBEAT_TIMEOUT_S, FailureCount, Heartbeats, RecoveryConfig
from megatron_medha.cluster.launch import Ranks
from megatron_medha.cluster.messages import RankLoading, RankReady
from megatron_medha.core.errors import RankError
from megatron_medha.core.ports import EnginePhase
from megatron_medha.engine.status_board import StatusBoard

_log = logging.getLogger(__name__)

_RESTART_DELAY_S = 1.0  # after the system had no process or descriptor for us


class StartProgress:
    """What all ranks have said while they start."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._seen: dict[int, list[str]] = {rank: [] for rank in range(num_ranks)}  # what each was doing, in order
        self._fractions: dict[int, float] = dict.fromkeys(range(num_ranks), 0.0)    # of what it does now
        self._ready: dict[int, RankReady] = {}

    def take(self, message: RankLoading | RankReady) -> None:
        """A rank has come further."""
        match message:
            case RankReady():
                self._ready[message.rank] = message
            case RankLoading():
                seen = self._seen[message.rank]
                if not seen or seen[-1] != message.what:
                    seen.append(message.what)
                self._fractions[message.rank] = message.fraction

    @property
    def is_complete(self) -> bool:
        """Whether every rank is ready."""
        return len(self._ready) == self._num_ranks

    @property
    def first(self) -> RankReady:
        """What rank 0 says; the checkpoint is the same for all."""
        return self._ready[0]

    @property
    def device(self) -> str:
        """What computes, for a person to read."""
        return self.first.device if self._num_ranks == 1 else f"{self._num_ranks} x {self.first.device}"

    @property
    def num_blocks(self) -> int:
        """KV blocks that every rank has."""
        return min(ready.num_blocks for ready in self._ready.values())

    @property
    def can_hold(self) -> bool:
        """Whether every rank can hold a step while another overtakes it."""
        return all(ready.can_hold for ready in self._ready.values())

    @property
    def can_run_ahead(self) -> bool:
        """Whether stages give tokens to one another on their devices."""
        return self.is_complete and all(ready.can_run_ahead for ready in self._ready.values())

    @property
    def what(self) -> str:
        """What the rank does that is furthest behind."""
        rank = self._last_rank()
        doing = self._seen[rank][-1] if self._seen[rank] else "starting"
        if self._num_ranks == 1:
            return doing
        return f"{doing}, rank {rank}; {len(self._ready)} of {self._num_ranks} ranks are ready"

    @property
    def fraction(self) -> float:
        """How much of that it has done, 0..1."""
        return self._fractions[self._last_rank()]

    def _last_rank(self) -> int:
        return min(
            self._seen, key=lambda rank: (rank in self._ready, len(self._seen[rank]), self._fractions[rank], rank)
        )


class RanksPhase(Enum):
    """Of the ranks of one replica, together."""

    STARTING = "starting"  # processes are coming up; nothing can be submitted
    LOST = "lost"          # they are up again, but the scheduler has not heard of it yet
    SERVING = "serving"


class RankStarts:
    """Brings the ranks up and says on the board how far they are. RankError ends it all: no start is worth a try."""

    def __init__(self, ranks: Ranks, num_ranks: int, recovery: RecoveryConfig, board: StatusBoard) -> None:
        """Starts nothing."""
        self._ranks, self._num_ranks = ranks, num_ranks
        self._recovery = recovery
        self._board = board
        self._failures = FailureCount(recovery)
        self.phase = RanksPhase.STARTING
        self.progress = StartProgress(num_ranks)
        self.heartbeats = Heartbeats(range(num_ranks), LOAD_HEARTBEAT_TIMEOUT_S, 0.0)
        self.loss_reason = ""
        self.restart_at_s: float | None = None     # when to try again, while no process can be started
        self._start_failed_s: float | None = None  # since when none can be
        self._num_starts = 0                       # since the ranks were last ready
        self._ready_s = self._served_s = 0.0       # when the ranks came up last; how long they have served before that
        self._num_blocks: int | None = None        # promised to the scheduler

    @property
    def is_first(self) -> bool:
        """Whether the ranks have never been up; a first start is not tried again."""
        return self._num_blocks is None

    def promised(self) -> StartProgress:
        """What the ranks said when they came up first; from now on they may be started again."""
        self._num_blocks = self.progress.num_blocks
        return self.progress

    def start(self, now_s: float) -> None:
        """Start all ranks again."""
        self._num_starts += 1
        self.phase = RanksPhase.STARTING
        self.progress = StartProgress(self._num_ranks)
        self.attempt(now_s)

    def attempt(self, now_s: float) -> None:
        """Start the processes, or note that there are none to be had just now."""
        self.restart_at_s = None
        try:
            self._ranks.start()
        except (OSError, zmq.ZMQError) as error:  # no descriptor, process or memory to be had just now
            self._postpone(error, now_s)
            return
        self._start_failed_s = None
        self.heartbeats.restart(LOAD_HEARTBEAT_TIMEOUT_S, now_s)

    def _postpone(self, error: Exception, now_s: float) -> None:
        """Try again later; RankError if this is the first start, or too long ago that one succeeded."""
        self._start_failed_s = now_s if self._start_failed_s is None else self._start_failed_s
        self._ranks.end(0.0)
        if self.is_first or now_s - self._start_failed_s > LOAD_HEARTBEAT_TIMEOUT_S:
            raise RankError(f"the ranks cannot be started: {error}") from error
        _log.error("ranks_start_failed retry_s=%g reason=%s", _RESTART_DELAY_S, error)
        self.note(f"no process can be started ({error})", 0.0)
        self.restart_at_s = now_s + _RESTART_DELAY_S

    def lose(self, why: str, now_s: float) -> None:
        """The ranks can no longer be used: end all of them, or give up (RankError)."""
        # One that was killed says nothing; others then say that they have lost their peer.
        why = next((str(ended) for ended in self._ranks.exits() if ended.was_killed), why)
        if self.is_first:
            raise RankError(why)
        _log.error("ranks_lost reason=%r", why)
        self._board.count_failure()
        if self.phase is RanksPhase.STARTING:
            if self._num_starts >= self._recovery.max_starts:
                raise RankError(f"{why}, while the ranks were starting again after: {self.loss_reason}")
        else:
            self.loss_reason = why
            self._num_starts = 0
            self._served_s += now_s - self._ready_s
            if not self._failures.failed(self._served_s):
                raise RankError(f"{why}: failure {len(self._failures)} within {self._recovery.failure_window_s:g} s")
        self._board.show(EnginePhase.RECOVERING, why)
        self._ranks.end(0.0)

    def check(self, now_s: float) -> None:
        """While they start: say what is missing, and let the others' silence begin only when nothing is."""
        if (missing := self._ranks.missing()) is not None:
            self.note(missing, 0.0)
            self.heartbeats.restart(LOAD_HEARTBEAT_TIMEOUT_S, now_s)

    def take(self, message: RankLoading | RankReady, now_s: float) -> None:
        """A rank has come further; with the last one ready the phase is another."""
        self.progress.take(message)
        if isinstance(message, RankLoading):
            self.note(self.progress.what, self.progress.fraction)
        elif self.progress.is_complete:
            self._are_ready(now_s)

    def _are_ready(self, now_s: float) -> None:
        self._ready_s = now_s
        self.heartbeats.restart(self._recovery.heartbeat_timeout_s, now_s)
        if self._num_blocks is None:
            self.phase = RanksPhase.SERVING  # start() is waiting
            return
        if self.progress.num_blocks < self._num_blocks:
            raise RankError(
                f"the ranks came back with {self.progress.num_blocks} KV blocks instead of {self._num_blocks}"
            )
        self._num_starts = 0
        self.phase = RanksPhase.LOST
        self._board.recovered(self.progress.device)
        _log.info("ranks_recovered why_lost=%r", self.loss_reason)

    def note(self, what: str, fraction: float) -> None:
        """What the ranks do while they come up."""
        if self.is_first:
            self._board.show(EnginePhase.LOADING, what, fraction)
        else:
            self._board.show(EnginePhase.RECOVERING, f"{self.loss_reason}; starting again: {what}", fraction)
