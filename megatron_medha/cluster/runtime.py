"""The real world seen from the scheduler's side: batches go to the rank as messages, results come back as events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from megatron_medha.cluster.messages import (
    FromRank,
    Heartbeat,
    Loading,
    NewRequest,
    RankFailed,
    Ready,
    Shutdown,
    Step,
    StepDone,
    ToRank,
)
from megatron_medha.core.batch import Aborted, Batch, Completed, Event, Output
from megatron_medha.core.errors import RankError
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.streams import Sampled, Streams

# How soon a dead rank is noticed while nothing else happens.
_CHECK_INTERVAL_S = 0.25


class RankLink:
    """The socket to the ranks: one ROUTER, each rank a DEALER that calls itself rank-N."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to a rank that is gone is an error, not a loss
        self.socket.bind(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)

    def send(self, rank: int, message: ToRank) -> None:
        """Send to one rank. Raises RankError if it is not connected."""
        try:
            self.socket.send_multipart((b"rank-%d" % rank, self._encoder.encode(message)))
        except zmq.ZMQError as error:
            raise RankError(f"rank {rank} cannot be reached: {error}") from None

    def receive(self) -> FromRank:
        """The next message; one must be there."""
        _, payload = self.socket.recv_multipart()
        return self._decoder.decode(payload)

    def close(self) -> None:
        """Close at once; unsent messages are dropped."""
        self.socket.close()
        self._context.term()


class ClusterRuntime:
    """A Runtime over one rank."""

    def __init__(self, link: RankLink, inbox: Inbox, streams: Streams, check_ranks: Callable[[], None]) -> None:
        """check_ranks raises RankError when a rank is gone."""
        self._link = link
        self._inbox = inbox
        self._streams = streams
        self._check_ranks = check_ranks
        self._poller = zmq.Poller()
        self._poller.register(link.socket, zmq.POLLIN)
        self._poller.register(inbox.fileno(), zmq.POLLIN)
        self._events: deque[Event | None] = deque()
        self._sampled: dict[str, Sampled] = {}  # of the batch completed last
        self._num_in_flight = 0

    def now_s(self) -> float:
        """See Runtime."""
        return time.monotonic()

    def wait_until_ready(self, note_loading: Callable[[str, float], None]) -> Ready | None:
        """Wait for the rank to have loaded; None if asked to stop meanwhile. Raises RankError if it dies."""
        while True:
            polled = dict(self._poller.poll(int(_CHECK_INTERVAL_S * 1000)))
            if self._inbox.fileno() in polled:
                self._events.extend(self._inbox.drain())
                if None in self._events:
                    return None
            if self._link.socket in polled:
                match message := self._link.receive():
                    case Loading():
                        note_loading(message.what, message.fraction)
                    case Ready():
                        return message
                    case RankFailed():
                        raise RankError(f"{message.kind}: {message.message}")
            elif not polled:
                self._check_ranks()

    def next_event(self) -> Event | None:
        """See Runtime."""
        self._streams.flush()
        while not self._events:
            polled = dict(self._poller.poll(int(_CHECK_INTERVAL_S * 1000)))
            if self._link.socket in polled:
                self._take(self._link.receive())
            if self._inbox.fileno() in polled:
                self._events.extend(self._inbox.drain())
            if not polled:
                self._check_ranks()
        event = self._events.popleft()
        if isinstance(event, Aborted):
            self._streams.drop(event.request_id)
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        return not self._num_in_flight

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        new_requests: list[NewRequest] = []
        for chunk in batch.chunks:
            if chunk.start == 0 and not (stream := self._streams[chunk.request_id]).is_known_to_ranks:
                stream.is_known_to_ranks = True
                token_ids = stream.token_ids
                new_requests.append(
                    NewRequest(chunk.request_id, token_ids.tobytes(), len(token_ids), stream.sampling)
                )
        self._link.send(0, Step(batch.batch_id, batch.chunks, tuple(new_requests), batch.released))
        self._num_in_flight += 1

    def emit(self, output: Output) -> None:
        """See Runtime."""
        self._streams.emit(output, self._sampled)

    def shut_down(self) -> None:
        """Ask the rank to end after its step."""
        try:
            self._link.send(0, Shutdown())
        except RankError:
            pass  # gone already, or never came: whoever started it makes certain

    def _take(self, message: FromRank) -> None:
        match message:
            case StepDone():
                self._num_in_flight -= 1
                self._sampled = {
                    token.request_id: Sampled(token.token_id, token.logprobs) for token in message.tokens
                }
                for part in message.prompt_logprobs:
                    if (stream := self._streams.get(part.request_id)) is not None:
                        # A prompt that lost its KV is computed again and yields the same positions again.
                        del stream.prompt_logprobs[part.first_position - 1 :]
                        stream.prompt_logprobs.extend(part.logprobs)
                self._events.append(
                    Completed(
                        batch_id=message.batch_id,
                        duration_s=message.duration_s,
                        stopped=tuple(token.request_id for token in message.tokens if token.is_stop),
                        failed=message.failed,
                    )
                )
            case Heartbeat():
                pass
            case RankFailed():
                raise RankError(f"rank {message.rank}: {message.kind}: {message.message}")
            case _:
                raise RankError(f"unexpected {type(message).__name__} from a rank that is serving")
