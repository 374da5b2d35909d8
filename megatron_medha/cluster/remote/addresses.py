"""Addresses of this machine, as others on the way to the API server see them."""

from __future__ import annotations

import socket as sockets
import struct
import sys

from megatron_medha.core.errors import ConfigError

_SIOCGIFADDR = 0x8915     # from linux/sockios.h


def local_address(host: str, port: int) -> str:
    """Which of this machine's addresses faces the API server; nothing is sent."""
    try:
        with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"--attach tcp://{host}:{port}: there is no way there ({error.strerror})") from None


def free_port(address: str) -> int:
    """A port that nobody has at that address just now."""
    with sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address, where the system tells; gloo wants its name."""
    if sys.platform != "linux":
        return None
    import fcntl

    wanted = sockets.inet_aton(address)
    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe:
        for _, name in sockets.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            if found[20:24] == wanted:
                return name
    return None
