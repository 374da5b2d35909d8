"""File descriptors: how many this process may have open, and how many connections that leaves room for."""

from __future__ import annotations

import logging
import os
import resource
from dataclasses import dataclass

_log = logging.getLogger(__name__)

# For what is opened beside connections: ranks, grammar processes, logs, and 16 connections beyond the limit. A server
# of one rank takes 28 in all.
_MIN_RESERVED, _MAX_RESERVED = 64, 256
_MIN_CONNECTIONS = 4
_MAX_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a listening socket may take."""

    num_connections: int  # open at once; beyond that only probes are answered
    backlog: int          # the event loop may accept so many before it looks at the first


def raise_descriptor_limit() -> None:
    """Set the soft limit to the hard one; shells and service managers often give 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS has a lower limit of its own, and says unlimited
        _log.warning("descriptor_limit_unchanged soft=%d hard=%d reason=%s", soft, hard, error)


def connection_limits(max_connections: int) -> ConnectionLimits:
    """The configured number of connections, or fewer where descriptors would not suffice for more."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ConnectionLimits(max_connections, _MAX_BACKLOG)
    num_free = soft - _num_open()
    num_reserved = min(_MAX_RESERVED, max(_MIN_RESERVED, num_free // 2))
    num_connections = min(max_connections, max(_MIN_CONNECTIONS, num_free - num_reserved))
    if num_connections < max_connections:
        _log.warning(
            "connections_limited max_connections=%d descriptors=%d connections=%d; raise ulimit -n",
            max_connections, soft, num_connections,
        )  # fmt: skip
    num_spare = num_free - num_connections - _MIN_RESERVED // 2
    return ConnectionLimits(num_connections, min(_MAX_BACKLOG, max(16, num_spare // 2)))


def _num_open() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 64  # not to be known here; a server that has just started has fewer
