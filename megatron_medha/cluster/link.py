"""The socket between the front and the ranks of one replica, for one life of those ranks."""

from __future__ import annotations

import msgspec
import zmq

from megatron_medha.cluster.keys import Keys
from megatron_medha.cluster.messages import FromRank, ToRank
from megatron_medha.core.errors import RankError

Context = zmq.Context[zmq.Socket[bytes]]


class RankLink:
    """One ROUTER, each rank a DEALER that calls itself rank-N.

    Ranks that are started again find another address: nothing said by their predecessors can be taken for theirs.
    """

    def __init__(self, context: Context, endpoint: str, keys: Keys | None = None) -> None:
        self.socket = router_socket(context, endpoint, keys)
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
            self.socket.send_multipart((b"rank-%d" % rank, payload))
        except zmq.ZMQError as error:
            raise RankError(f"rank {rank} cannot be reached: {error}") from None

    def receive(self) -> FromRank | None:
        """The next message, None if there is none."""
        try:
            _, payload = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self._decoder.decode(payload)

    def close(self) -> None:
        """Close at once; unsent messages are dropped."""
        self.socket.close()


def router_socket(
    context: Context, endpoint: str, keys: Keys | None, *, takes_over: bool = False
) -> zmq.Socket[bytes]:
    """A bound ROUTER; it takes encrypted connections alone where there are keys. Raises RankError.

    takes_over: a peer that comes again under its name replaces the old connection, which may hang since its machine
    went down.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to a rank that is gone is an error, not a loss
    socket.setsockopt(zmq.ROUTER_HANDOVER, int(takes_over))
    if keys is not None:
        keys.secure_front(socket)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise RankError(f"cannot listen on {endpoint}: {error}") from None
    return socket
