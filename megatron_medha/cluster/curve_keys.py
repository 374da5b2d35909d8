"""The keys of encrypted connections (ZeroMQ CURVE): a file that the API server writes and remote ranks read."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from megatron_medha.core.errors import ConfigError
from megatron_medha.system.checked_files import check_private


class CurveKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the file may be a rank of this server; nobody else can connect, or listen in."""

    front_public: str
    front_secret: str
    rank_public: str
    rank_secret: str

    @classmethod
    def load_or_make(cls, path: Path) -> CurveKeys:
        """The keys in the file; where there is none it is written, readable for its owner alone. Raises ConfigError."""
        if path.exists():
            check_private(path, "launch.key_file")
            return cls.load(path)
        pairs = (*zmq.curve_keypair(), *zmq.curve_keypair())
        keys = cls(**{name: key.decode() for name, key in zip(cls.__struct_fields__, pairs, strict=True)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")
        except OSError as error:
            raise ConfigError(f"launch.key_file={path}: cannot be written ({error.strerror})") from None
        return keys

    @classmethod
    def load(cls, path: Path) -> CurveKeys:
        """The keys in the file. Raises ConfigError if it cannot be read or holds something else."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"key file {path}: cannot be read ({error.strerror}); the API server writes it") from None
        except msgspec.DecodeError as error:
            raise ConfigError(f"key file {path}: not one that the API server wrote ({error})") from None

    def secure_server_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket of the API server take encrypted connections only; before it is bound."""
        socket.curve_secretkey = self.front_secret.encode()
        socket.curve_publickey = self.front_public.encode()
        socket.curve_server = True

    def secure_rank_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket of a rank connect encrypted; before it is connected."""
        socket.curve_secretkey = self.rank_secret.encode()
        socket.curve_publickey = self.rank_public.encode()
        socket.curve_serverkey = self.front_public.encode()

    def guard(self, context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
        """Refuse peers that do not hold the ranks' key, on all sockets of this context; stop it before they end."""
        guard = ThreadAuthenticator(context)
        guard.start()
        rank_public = self.rank_public.encode()
        is_known = SimpleNamespace(callback=lambda domain, key: key == rank_public)
        guard.configure_curve_callback(credentials_provider=is_known)
        return guard
