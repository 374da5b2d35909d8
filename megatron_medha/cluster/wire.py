"""Reading what comes over the sockets: any peer may send anything, and no message may end its reader."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import msgspec

from megatron_medha.cluster.messages import FromRank, ToRank
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import RankError

T = TypeVar("T")

_log = logging.getLogger(__name__)

_MAX_LOGGED_PEERS = 1000  # each once: who sends one bad message may send a million


class UnreadableMessage(RankError):
    """No message of ours, or one of another version; the text says why."""


def read_message(decoder: msgspec.msgpack.Decoder[T], frames: Sequence[bytes]) -> T:
    """The message in these frames, of which there must be one. Raises UnreadableMessage."""
    if len(frames) != 1:
        raise UnreadableMessage(f"{len(frames)} frames instead of 1")
    try:
        return decoder.decode(frames[0])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableMessage(str(error)) from None


class RejectedPeers:
    """Logs whose messages were not taken, each peer once."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._logged: set[bytes] = set()

    def refuse(self, peer: bytes, why: str) -> None:
        """A message of that peer was dropped."""
        if peer in self._logged or len(self._logged) >= _MAX_LOGGED_PEERS:
            return
        self._logged.add(peer)
        _log.warning("message_rejected at=%s peer=%r reason=%r", self._place, peer[:64], why[:300])


@cache
def protocol_version() -> str:
    """The package's version and a digest of all messages: server and ranks of other machines must agree on both."""
    try:
        package = version("megatron_medha")
    except PackageNotFoundError:
        package = "0+unknown"
    _, fields = msgspec.json.schema_components([FromRank, ToRank, RankConfig])
    for schema in fields.values():
        schema.pop("description", None)  # a docstring changes no message
    digest = hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()[:8]
    return f"{package}/{digest}"
