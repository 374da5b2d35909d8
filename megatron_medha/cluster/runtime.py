"""The real world seen from the scheduler's side: batches go to the ranks as messages, results come back as events.

Ranks that are lost are ended and started again here, while the scheduler goes on to take requests and the streams of
clients stay open; then it hears of it (RanksLost) and computes the KV of its sequences again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

import zmq

from megatron_medha.cluster.collector import BatchResult, StepCollector
from megatron_medha.cluster.health import (
    LOAD_HEARTBEAT_TIMEOUT_S,
    FailureCount,
    Heartbeats,
    RecoveryConfig,
    StepWatchdog,
)
from megatron_medha.cluster.launch import Ranks
from megatron_medha.cluster.messages import (
    FromRank,
    GrammarPrepared,
    Heartbeat,
    NewRequest,
    Ping,
    RankFailed,
    RankLoading,
    RankReady,
    Shutdown,
    StepDone,
)
from megatron_medha.cluster.pending_grammars import PendingGrammars
from megatron_medha.cluster.rank_state import RankStateCache
from megatron_medha.cluster.start_progress import StartProgress
from megatron_medha.core.batch import Aborted, Batch, Event, Output, RanksLost, TokenOut
from megatron_medha.core.errors import RankError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.request_states import RequestStates, TokenSample
from megatron_medha.engine.status_board import StatusBoard

_log = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 0.25    # how soon a dead rank is noticed
_PING_INTERVAL_S = 1.0      # how soon a closed connection is
_EXIT_MESSAGE_GRACE_S = 1.0         # that a rank may have sent before it ended, behind those of others
_SHUTDOWN_TIMEOUT_S = 5.0   # a rank finishes its step first
_RESTART_DELAY_S = 1.0        # after the system had no process or descriptor for us


class _RanksPhase(Enum):
    STARTING = "starting"  # processes are coming up; nothing can be submitted
    LOST = "lost"          # they are up again, but the scheduler has not heard of it yet
    SERVING = "serving"


class ClusterRuntime:
    """A Runtime over the ranks of one replica."""

    def __init__(
        self,
        ranks: Ranks,
        layout: ParallelLayout,
        inbox: Inbox,
        streams: RequestStates,
        board: StatusBoard,
        recovery: RecoveryConfig,
    ) -> None:
        """Starts nothing. layout: of this replica, dp = 1."""
        assert layout.dp == 1
        self.on_step: list[Callable[[StepDone, float], None]] = []  # called with every answer and when it came
        self._ranks = ranks
        self._layout = layout
        self._inbox = inbox
        self._streams = streams
        self._board = board
        self._recovery = recovery
        self._collector = StepCollector(layout)
        self._rank_state = RankStateCache(layout, self._describe)
        self._pending_grammars = PendingGrammars(_sampling_ranks(layout), self._grammar_of)
        self._watchdog = StepWatchdog(recovery)
        self._failures = FailureCount(recovery)
        self._heartbeats = Heartbeats(range(layout.world_size), LOAD_HEARTBEAT_TIMEOUT_S, 0.0)
        self._phase = _RanksPhase.STARTING
        self._progress = StartProgress(layout.world_size)
        self._num_starts = 0               # since the ranks were last ready
        self._restart_at_s: float | None = None    # when to try again, while no process can be started
        self._start_failed_s: float | None = None   # since when none can be
        self._loss_reason = ""
        self._ready_s = self._served_s = 0.0  # when the ranks came up last; how long they have served before that
        self._num_blocks: int | None = None  # promised to the scheduler
        self._events: deque[Event | BatchResult | None] = deque()
        self._sampled: dict[str, TokenSample] = {}  # of the batch that was taken up last
        self._poller = zmq.Poller()
        self._next_check_s = self._next_ping_s = 0.0

    def now_s(self) -> float:
        """See Runtime."""
        return time.monotonic()

    # ---- the life of the ranks ----

    def start(self) -> StartProgress | None:
        """Start the ranks and wait for all to have loaded; what they said then.

        None if asked to stop meanwhile. Raises RankError if one fails; a first start is not tried again, since what
        stops it is most often what the user asked for.
        """
        self._start_ranks()
        while self._phase is _RanksPhase.STARTING:
            self._wait()
            if None in self._events:
                return None
        self._num_blocks = self._progress.num_blocks
        return self._progress

    def shut_down(self) -> None:
        """End the ranks: in order where they serve, at once where they do not."""
        is_serving = self._phase is not _RanksPhase.STARTING
        if is_serving:
            for rank in range(self._layout.world_size):
                try:
                    self._ranks.link.send(rank, Shutdown())
                except RankError:
                    is_serving = False  # others would wait for it for ever
        self._ranks.end(_SHUTDOWN_TIMEOUT_S if is_serving else 0.0)
        self._ranks.close()

    def _start_ranks(self) -> None:
        self._num_starts += 1
        self._phase = _RanksPhase.STARTING
        self._progress = StartProgress(self._layout.world_size)
        self._attempt_start()

    def _attempt_start(self) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._inbox.fileno(), zmq.POLLIN)
        self._restart_at_s = None
        try:
            self._ranks.start()
        except (OSError, zmq.ZMQError) as error:  # no descriptor, process or memory to be had just now
            self._postpone_start(error)
            return
        self._start_failed_s = None
        for socket in (self._ranks.link.socket, *self._ranks.sockets):
            self._poller.register(socket, zmq.POLLIN)
        self._heartbeats.restart(LOAD_HEARTBEAT_TIMEOUT_S, self.now_s())

    def _postpone_start(self, error: Exception) -> None:
        """Try again later; RankError if this is the first start, or too long ago that one succeeded."""
        now_s = self.now_s()
        self._start_failed_s = now_s if self._start_failed_s is None else self._start_failed_s
        self._ranks.end(0.0)
        if self._num_blocks is None or now_s - self._start_failed_s > LOAD_HEARTBEAT_TIMEOUT_S:
            raise RankError(f"the ranks cannot be started: {error}") from error
        _log.error("ranks_not_started retry_s=%g why=%s", _RESTART_DELAY_S, error)
        self._note_start(f"no process can be started ({error})", 0.0)
        self._restart_at_s = now_s + _RESTART_DELAY_S

    def _lose_ranks(self, why: str) -> None:
        """The ranks can no longer be used: end all of them and start them again, or give up (RankError)."""
        # One that was killed says nothing; others then say that they have lost their peer.
        why = next((str(ended) for ended in self._ranks.exits() if ended.was_killed), why)
        if self._num_blocks is None:
            raise RankError(why)
        _log.error("ranks_lost why=%r", why)
        self._board.count_failure()
        if self._phase is _RanksPhase.STARTING:
            if self._num_starts >= self._recovery.max_starts:
                raise RankError(f"{why}, while the ranks were starting again after: {self._loss_reason}")
        else:
            self._loss_reason = why
            self._num_starts = 0
            self._served_s += self.now_s() - self._ready_s
            if not self._failures.failed(self._served_s):
                raise RankError(f"{why}: failure {len(self._failures)} within {self._recovery.failure_window_s:g} s")
        self._board.recovering(why, 0.0)
        self._ranks.end(0.0)
        self._collector.clear()
        self._rank_state.clear()
        self._watchdog.clear()
        # A loss that the scheduler has not heard of yet is part of this one.
        self._events = deque(event for event in self._events if not isinstance(event, RanksLost))
        self._pending_grammars.restart()
        self._start_ranks()

    def _ranks_are_ready(self) -> None:
        self._ready_s = self.now_s()
        self._heartbeats.restart(self._recovery.heartbeat_timeout_s, self._ready_s)
        if self._num_blocks is None:
            self._phase = _RanksPhase.SERVING  # start() is waiting
            return
        if self._progress.num_blocks < self._num_blocks:
            raise RankError(
                f"the ranks came back with {self._progress.num_blocks} KV blocks instead of {self._num_blocks}"
            )
        self._num_starts = 0
        self._phase = _RanksPhase.LOST
        self._events.append(RanksLost(self._loss_reason))
        self._board.recovered(self._progress.device)
        _log.info("ranks_recovered why_lost=%r", self._loss_reason)

    # ---- the loop's side ----

    def next_event(self) -> Event | None:
        """See Runtime."""
        self._streams.flush()
        while not self._events:
            self._wait()
        event = self._events.popleft()
        match event:
            case BatchResult():
                self._sampled = {
                    token.request_id: TokenSample(token.token_id, token.logprobs) for token in event.tokens
                }
                return event.completed
            case Aborted():
                self._streams.drop(event.request_id)
            case RanksLost():
                self._phase = _RanksPhase.SERVING
            case _:
                pass
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        return self._phase is _RanksPhase.SERVING and len(self._collector) < self._layout.spp

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        self._collector.submitted(batch.batch_id)
        self._watchdog.submitted(batch.batch_id, batch.predicted_s, self.now_s())
        link, layout = self._ranks.link, self._layout
        payloads = [link.encode(step) for step in self._rank_state.steps(batch)]
        try:
            for rank in range(layout.world_size):
                link.send_encoded(rank, payloads[layout.coord_of(rank).kvp])
        except RankError as error:
            self._lose_ranks(str(error))

    def emit(self, output: Output) -> None:
        """See Runtime."""
        self._streams.emit(output, self._sampled)
        if isinstance(output, TokenOut) and output.finish_reason is None:
            self._rank_state.sampled(output.request_id, self._sampled[output.request_id].token_id)

    def _describe(self, request_id: str) -> NewRequest:
        stream = self._streams[request_id]
        token_ids = stream.token_ids + stream.output_ids if stream.output_ids else stream.token_ids
        return NewRequest(request_id, token_ids.tobytes(), len(stream.token_ids), stream.sampling)

    def _grammar_of(self, request_id: str) -> str | None:
        stream = self._streams.get(request_id)
        return None if stream is None else stream.sampling.grammar

    # ---- waiting ----

    def _wait(self) -> None:
        """Wait for anything to happen, a fraction of a second at most, and take it up."""
        polled = dict(self._poller.poll(int(_CHECK_INTERVAL_S * 1000)))
        if self._inbox.fileno() in polled:
            for event in self._inbox.drain():
                self._events.extend(self._pending_grammars.admit(event))
        if self._restart_at_s is not None:
            if self.now_s() >= self._restart_at_s:
                self._attempt_start()
            return
        try:
            if self._phase is not _RanksPhase.STARTING:
                self._send_prepare()
            if self._ranks.link.socket in polled:
                self._receive()
            if any(socket in polled for socket in self._ranks.sockets):
                self._ranks.poll()
            if self.now_s() >= self._next_check_s:
                self._check()
        except RankError as error:
            self._lose_ranks(str(error))

    def _send_prepare(self) -> None:
        for question in self._pending_grammars.take_prepare_messages():
            payload = self._ranks.link.encode(question)
            for rank in self._pending_grammars.ranks:
                self._ranks.link.send_encoded(rank, payload)

    def _check(self) -> None:
        now_s = self.now_s()
        self._next_check_s = now_s + _CHECK_INTERVAL_S
        self._ranks.poll()
        if self._phase is _RanksPhase.STARTING:
            if (missing := self._ranks.missing()) is not None:
                self._note_start(missing, 0.0)
                self._heartbeats.restart(LOAD_HEARTBEAT_TIMEOUT_S, now_s)
        elif now_s >= self._next_ping_s:
            self._next_ping_s = now_s + _PING_INTERVAL_S
            for rank in range(self._layout.world_size):
                self._ranks.link.send(rank, Ping())
        if exits := self._ranks.exits():
            until_s = now_s if all(ended.was_killed for ended in exits) else now_s + _EXIT_MESSAGE_GRACE_S
            while self._ranks.link.socket.poll(int(max(0.0, until_s - self.now_s()) * 1000)):
                self._receive()
            raise RankError(str(exits[0]))
        if (why := self._heartbeats.failure(now_s) or self._watchdog.failure(now_s)) is not None:
            raise RankError(why)

    def _receive(self) -> None:
        link = self._ranks.link
        while (message := link.receive()) is not None:
            self._take(message)

    def _take(self, message: FromRank) -> None:
        self._heartbeats.heard(message.rank, self.now_s())
        match message:
            case StepDone() if self._phase is not _RanksPhase.STARTING and self._collector.expects(message):
                for on_step in self.on_step:
                    on_step(message, self.now_s())
                for event in self._collector.take(message):
                    self._events.append(event)
                    if isinstance(event, BatchResult):
                        self._note_completed(event)
            case Heartbeat():
                pass
            case GrammarPrepared():
                self._events.extend(self._pending_grammars.take(message))
            case RankLoading() if self._phase is _RanksPhase.STARTING:
                self._progress.take(message)
                self._note_start(self._progress.what, self._progress.fraction)
            case RankReady() if self._phase is _RanksPhase.STARTING:
                self._progress.take(message)
                if self._progress.is_complete:
                    self._ranks_are_ready()
            case RankFailed():
                # What stops a first start is most often the user's own mistake, and then the same on every rank.
                who = "" if self._num_blocks is None else f"rank {message.rank}: "
                raise RankError(f"{who}{message.kind}: {message.message}")
            case _:
                raise RankError(f"unexpected {type(message).__name__} from rank {message.rank}")

    def _note_completed(self, result: BatchResult) -> None:
        self._watchdog.completed(result.completed.batch_id, self.now_s())
        for part in result.prompt_logprobs:
            if (stream := self._streams.get(part.request_id)) is not None:
                # A prompt that lost its KV is computed again and yields the same positions again.
                del stream.prompt_logprobs[part.first_position - 1 :]
                stream.prompt_logprobs.extend(part.logprobs)

    def _note_start(self, what: str, fraction: float) -> None:
        if self._num_blocks is None:
            self._board.loading(what, fraction)
        else:
            self._board.recovering(f"{self._loss_reason}; starting again: {what}", fraction)


def _sampling_ranks(layout: ParallelLayout) -> list[int]:
    coords = {rank: layout.coord_of(rank) for rank in range(layout.world_size)}
    return [rank for rank, coord in coords.items() if coord.spp == layout.spp - 1 and coord.tp == 0]
