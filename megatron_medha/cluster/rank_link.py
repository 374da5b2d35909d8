"""The socket between the API server and the ranks of one replica, for one life of those ranks."""

from __future__ import annotations

import secrets

import msgspec
import zmq

from megatron_medha.cluster.curve_keys import CurveKeys
from megatron_medha.cluster.messages import FromRank, GrammarPrepared, Heartbeat, RankFailed, ToRank
from megatron_medha.cluster.rank_config import connection_name
from megatron_medha.cluster.wire import RejectedPeers, UnreadableMessage, read_message
from megatron_medha.core.errors import RankError

Context = zmq.Context[zmq.Socket[bytes]]

_MAX_MESSAGE_BYTES = 2**28  # of a rank: log-probabilities of a long chunk are megabytes
_MAX_REJECTED_PER_POLL = 1000  # then others have their turn


class RankLink:
    """One ROUTER, each rank a DEALER that calls itself rank-N-TOKEN.

    Ranks that are started again find another address: nothing said by their predecessors can be taken for theirs.
    """

    def __init__(self, context: Context, endpoint: str, num_ranks: int, keys: CurveKeys | None = None) -> None:
        self.socket = router_socket(context, endpoint, keys, max_message_bytes=_MAX_MESSAGE_BYTES)
        self.token = secrets.token_hex(8)  # in the names of all connections of these ranks
        self._num_ranks = num_ranks
        self._refused = RejectedPeers("ranks")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)

    def send(self, rank: int, message: ToRank) -> None:
        """Send to one rank. Raises RankError if it is not connected."""
        self.send_encoded(rank, self._encoder.encode(message))

    def encode(self, message: ToRank) -> bytes:
        """A message for send_encoded(), which several ranks get."""
        return self._encoder.encode(message)

    def send_encoded(self, rank: int, payload: bytes) -> None:
        """See send()."""
        try:
            self.socket.send_multipart((connection_name(rank, "", self.token), payload))
        except zmq.ZMQError as error:
            raise RankError(f"rank {rank} cannot be reached: {error}") from None

    def receive(self) -> FromRank | None:
        """The next message, None if there is none. What no rank of ours would send is logged and dropped."""
        for _ in range(_MAX_REJECTED_PER_POLL):
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                message = read_message(self._decoder, frames)
                self._check_sender(peer, message)
            except UnreadableMessage as error:
                self._refused.refuse(peer, str(error))
            else:
                return message
        return None

    def _check_sender(self, peer: bytes, message: FromRank) -> None:
        # A name is taken once per socket, so what the names of a rank's own connections say is said by that rank.
        rank = message.rank
        if not 0 <= rank < self._num_ranks:
            raise UnreadableMessage(f"rank {rank} of {self._num_ranks}")
        match message:
            case Heartbeat():
                senders: tuple[str, ...] = ("heartbeat",)
            case GrammarPrepared():
                senders = ("grammars",)
            case RankFailed():
                senders = ("", "grammars")
            case _:
                senders = ("",)
        if peer not in [connection_name(rank, sender, self.token) for sender in senders]:
            raise UnreadableMessage(f"{type(message).__name__} of rank {rank} from a connection of another name")

    def close(self) -> None:
        """Close at once; unsent messages are dropped."""
        self.socket.close()


def router_socket(
    context: Context, endpoint: str, keys: CurveKeys | None, *, max_message_bytes: int, queue_length: int = 0
) -> zmq.Socket[bytes]:
    """A bound ROUTER; it takes encrypted connections alone where there are keys. Raises RankError.

    max_message_bytes: who sends a longer one loses the connection. queue_length: messages from one peer that wait to be
    read, and to it that wait to be sent. 0: no limit.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue_length)
    socket.setsockopt(zmq.RCVHWM, queue_length)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to a rank that is gone is an error, not a loss
    if keys is not None:
        keys.secure_server_socket(socket)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise RankError(f"cannot listen on {endpoint}: {error}") from None
    return socket
