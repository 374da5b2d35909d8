"""Messages from the API server to a rank. Does not import torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from megatron_medha.cluster.messages import Ping, PrepareGrammar, RankStep, Shutdown, ToRank
from megatron_medha.cluster.wire import read_message

_log = logging.getLogger(__name__)

# How often an idle rank checks its parent, in case the kernel did not kill it with the parent.
_PARENT_CHECK_MS = 1000


class MessageInbox(Protocol):
    """Source of messages from the API server."""

    def wait(self) -> RankStep | Shutdown | None:
        """The next message; None when the API server has exited. Raises RankError for an unreadable message."""

    def poll(self) -> RankStep | Shutdown | None:
        """The next message if one has arrived."""


class SocketInbox:
    """A MessageInbox that ends when the parent process exits."""

    def __init__(self, socket: zmq.Socket[bytes], parent_pid: int, prepare: Callable[[PrepareGrammar], None]) -> None:
        """prepare: called with work to be done in the background; must not block."""
        self._socket, self._parent_pid, self._prepare = socket, parent_pid, prepare
        self._decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)

    def wait(self) -> RankStep | Shutdown | None:
        """See MessageInbox."""
        while True:
            while not self._socket.poll(_PARENT_CHECK_MS):
                if os.getppid() != self._parent_pid:
                    _log.warning("parent_exited")
                    return None
            if (message := self.poll()) is not None:
                return message

    def poll(self) -> RankStep | Shutdown | None:
        """See MessageInbox."""
        while True:
            try:
                message = read_message(self._decoder, self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return None
            match message:
                case RankStep() | Shutdown():
                    return message
                case PrepareGrammar():
                    self._prepare(message)
                case Ping():
                    pass
