"""Messages of the API server, as the rank's loop takes them. No torch here."""

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

# How soon an orphan notices where the kernel does not tell it; an idle rank wakes up this often.
_PARENT_CHECK_MS = 1000


class MessageInbox(Protocol):
    """Where messages of the API server come in."""

    def wait(self) -> RankStep | Shutdown | None:
        """The next message; None when none will come any more. Raises RankError for one that cannot be read."""

    def poll(self) -> RankStep | Shutdown | None:
        """The next message if it is there already."""


class SocketInbox:
    """A MessageInbox, for as long as the process that started this one lives."""

    def __init__(self, socket: zmq.Socket[bytes], parent_pid: int, prepare: Callable[[PrepareGrammar], None]) -> None:
        """prepare: takes what is to be done beside the steps; must not wait."""
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
