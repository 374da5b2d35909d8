"""The real world seen from the scheduler's side: batches go to the ranks as messages, results come back as events.

Ranks that are lost are ended and started again here, while the scheduler goes on to take requests and the streams of
clients stay open; then it hears of it (RanksLost) and computes the KV of its sequences again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from math import ceil, inf

import zmq

from megatron_medha.cluster.collector import BatchResult, StepCollector
from megatron_medha.cluster.health import RecoveryConfig, StepWatchdog
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
from megatron_medha.cluster.rank_starts import RanksPhase, RankStarts, StartProgress
from megatron_medha.cluster.rank_state import RankStateCache
from megatron_medha.core.batch import Aborted, Batch, Event, Output, RanksLost, TokenOut, Woken
from megatron_medha.core.errors import RankError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.request_states import RequestStates, TokenSample
from megatron_medha.engine.status_board import StatusBoard

_CHECK_INTERVAL_S = 0.25    # how soon a dead rank is noticed
_PING_INTERVAL_S = 1.0      # how soon a closed connection is
_EXIT_MESSAGE_GRACE_S = 1.0         # that a rank may have sent before it ended, behind those of others
_SHUTDOWN_TIMEOUT_S = 5.0   # a rank finishes its step first


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
        self._collector = StepCollector(layout)
        self._rank_state = RankStateCache(layout, self._describe)
        self._pending_grammars = PendingGrammars(_sampling_ranks(layout), self._grammar_of)
        self._watchdog = StepWatchdog(recovery)
        self._starts = RankStarts(ranks, layout.world_size, recovery, board)
        self._events: deque[Event | BatchResult | None] = deque()
        self._sampled: dict[str, TokenSample] = {}  # of the batch that was taken up last
        self._running_ahead: int | None = None  # the batch in flight after which stages go on, and no other may come
        self._poller = zmq.Poller()
        self._next_check_s = self._next_ping_s = 0.0
        self.wakes_at_s: Callable[[], float] = _never

    def now_s(self) -> float:
        """See Runtime."""
        return time.monotonic()

    # ---- the life of the ranks ----

    def start(self) -> StartProgress | None:
        """Start the ranks and wait for all to have loaded; what they said then.

        None if asked to stop meanwhile. Raises RankError if one fails; a first start is not tried again, since what
        stops it is most often what the user asked for.
        """
        self._starts.start(self.now_s())
        self._register_sockets()
        while self._starts.phase is RanksPhase.STARTING:
            self._wait()
            if None in self._events:
                return None
        return self._starts.promised()

    def shut_down(self) -> None:
        """End the ranks: in order where they serve, at once where they do not."""
        is_serving = self._starts.phase is not RanksPhase.STARTING
        if is_serving:
            for rank in range(self._layout.world_size):
                try:
                    self._ranks.link.send(rank, Shutdown())
                except RankError:
                    is_serving = False  # others would wait for it for ever
        self._ranks.end(_SHUTDOWN_TIMEOUT_S if is_serving else 0.0)
        self._ranks.close()

    def _register_sockets(self) -> None:
        """Of the inbox, and of ranks that have been started."""
        self._poller = zmq.Poller()
        self._poller.register(self._inbox.fileno(), zmq.POLLIN)
        if self._starts.restart_at_s is None:
            for socket in (self._ranks.link.socket, *self._ranks.sockets):
                self._poller.register(socket, zmq.POLLIN)

    def _lose_ranks(self, why: str) -> None:
        """The ranks can no longer be used: end all of them and start them again, or give up (RankError)."""
        self._starts.lose(why, self.now_s())
        self._collector.clear()
        self._running_ahead = None
        self._rank_state.clear()
        self._watchdog.clear()
        # A loss that the scheduler has not heard of yet is part of this one.
        self._events = deque(event for event in self._events if not isinstance(event, RanksLost))
        self._pending_grammars.restart()
        self._starts.start(self.now_s())
        self._register_sockets()

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
                if filled_keys := self._streams.filled_keys(self._sampled):
                    return event.completed._replace(filled_keys=filled_keys)
                return event.completed
            case Aborted():
                self._streams.drop(event.request_id)
            case RanksLost():
                self._starts.phase = RanksPhase.SERVING
            case _:
                pass
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        # One more than there are stages may overtake the others; the scheduler knows whether it does.
        is_serving = self._starts.phase is RanksPhase.SERVING
        return is_serving and len(self._collector) <= self._layout.spp and self._running_ahead is None

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        runs_ahead = self._runs_ahead(batch)
        if runs_ahead:
            self._running_ahead = batch.batch_id
        self._collector.submitted(batch.batch_id)
        self._watchdog.submitted(batch.batch_id, batch.predicted_s, self.now_s())
        link, layout = self._ranks.link, self._layout
        payloads = [link.encode(step) for step in self._rank_state.steps(batch, runs_ahead)]
        try:
            for rank in range(layout.world_size):
                link.send_encoded(rank, payloads[layout.coord_of(rank).kvp])
        except RankError as error:
            self._lose_ranks(str(error))

    def _runs_ahead(self, batch: Batch) -> bool:
        """Whether stages go on to a batch's next decodes: where nobody could be computed meanwhile.

        A request that comes while it is in flight waits until it is answered, a decode's time at most.
        """
        if self._layout.spp == 1 or len(self._collector) or not batch.chunks:
            return False
        if not self._starts.progress.can_run_ahead:
            return False
        return len(batch.chunks) == len(self._streams) and all(chunk.samples_token for chunk in batch.chunks)

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
        wait_s = min(_CHECK_INTERVAL_S, max(0.0, self.wakes_at_s() - self.now_s()))
        polled = dict(self._poller.poll(ceil(wait_s * 1000)))
        if self.wakes_at_s() <= self.now_s():
            self._events.append(Woken())
        if self._inbox.fileno() in polled:
            for event in self._inbox.drain():
                self._events.extend(self._pending_grammars.admit(event))
        if self._starts.restart_at_s is not None:
            if self.now_s() >= self._starts.restart_at_s:
                self._starts.attempt(self.now_s())
                self._register_sockets()
            return
        try:
            if self._starts.phase is not RanksPhase.STARTING:
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
        if self._starts.phase is RanksPhase.STARTING:
            self._starts.check(now_s)
        elif now_s >= self._next_ping_s:
            self._next_ping_s = now_s + _PING_INTERVAL_S
            for rank in range(self._layout.world_size):
                self._ranks.link.send(rank, Ping())
        if exits := self._ranks.exits():
            until_s = now_s if all(ended.was_killed for ended in exits) else now_s + _EXIT_MESSAGE_GRACE_S
            while self._ranks.link.socket.poll(int(max(0.0, until_s - self.now_s()) * 1000)):
                self._receive()
            raise RankError(str(exits[0]))
        if (why := self._starts.heartbeats.failure(now_s) or self._watchdog.failure(now_s)) is not None:
            raise RankError(why)

    def _receive(self) -> None:
        link = self._ranks.link
        while (message := link.receive()) is not None:
            self._take(message)

    def _take(self, message: FromRank) -> None:
        self._starts.heartbeats.heard(message.rank, self.now_s())
        match message:
            case StepDone() if self._starts.phase is not RanksPhase.STARTING and self._collector.expects(message):
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
            case RankLoading() | RankReady() if self._starts.phase is RanksPhase.STARTING:
                self._starts.take(message, self.now_s())
                if self._starts.phase is RanksPhase.LOST:
                    self._events.append(RanksLost(self._starts.loss_reason))
            case RankFailed():
                # What stops a first start is most often the user's own mistake, and then the same on every rank.
                who = "" if self._starts.is_first else f"rank {message.rank}: "
                raise RankError(f"{who}{message.kind}: {message.message}")
            case _:
                raise RankError(f"unexpected {type(message).__name__} from rank {message.rank}")

    def _note_completed(self, result: BatchResult) -> None:
        self._watchdog.completed(result.completed.batch_id, self.now_s())
        if result.completed.batch_id == self._running_ahead:
            self._running_ahead = None
        for part in result.prompt_logprobs:
            if (stream := self._streams.get(part.request_id)) is not None:
                # A prompt that lost its KV is computed again and yields the same positions again.
                del stream.prompt_logprobs[part.first_position - 1 :]
                stream.prompt_logprobs.extend(part.logprobs)


def _never() -> float:
    return inf


def _sampling_ranks(layout: ParallelLayout) -> list[int]:
    coords = {rank: layout.coord_of(rank) for rank in range(layout.world_size)}
    return [rank for rank, coord in coords.items() if coord.spp == layout.spp - 1 and coord.tp == 0]
