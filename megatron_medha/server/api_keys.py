"""Who a request comes from: API keys from configuration and file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError
from megatron_medha.server.server_config import ServerConfig


@dataclass(frozen=True, slots=True)
class ApiClient:
    """The user behind a key. The name goes into logs and metrics, the key never."""

    name: str
    is_admin: bool = False


ANONYMOUS = ApiClient("anonymous")
LOCAL_ADMIN = ApiClient("anonymous", is_admin=True)  # where no key is needed, every client may see everything
CONFIGURED_NAME, ADMIN_NAME = "default", "admin"


class ApiKeys:
    """The keys that open this server. Only digests are kept, all of one length."""

    def __init__(self, config: ServerConfig) -> None:
        """Read the key file. Raises ConfigError naming the line that is wrong, never the key."""
        self._needs_key = config.needs_key or config.admin_key is not None
        self._is_open = not config.needs_key
        self.has_admin_key = config.admin_key is not None
        self._clients: list[tuple[bytes, ApiClient]] = []
        if config.admin_key is not None:
            self._add(config.admin_key, ApiClient(ADMIN_NAME, is_admin=True), "server.admin_key")
        if config.api_key is not None:
            self._add(config.api_key, ApiClient(CONFIGURED_NAME), "server.api_key")
        if config.api_key_file is not None:
            self._read(config)

    def find(self, authorization: str | None) -> ApiClient | None:
        """The client of this Authorization header; None: not authorized."""
        if not self._needs_key:
            return LOCAL_ADMIN
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip().encode("utf-8", "replace"))
        found: ApiClient | None = None
        for known, client in self._clients:  # all of them: the time must not depend on the key
            if hmac.compare_digest(digest, known):
                found = client
        if found is not None and scheme.lower() == "bearer":
            return found
        # A wrong key is rejected even where none is needed: it is a client's mistake.
        return ANONYMOUS if self._is_open and authorization is None else None

    def _read(self, config: ServerConfig) -> None:
        path = config.api_key_file
        assert path is not None
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"server.api_key_file={path} cannot be read: {error}") from None
        num_keys = 0
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or not line.isascii():
                raise ConfigError(f"server.api_key_file={path}: line {number}: expected `NAME KEY`, in ASCII")
            name, key = words
            if name in (ADMIN_NAME, ANONYMOUS.name):
                raise ConfigError(f"server.api_key_file={path}: line {number}: the name {name} is the server's own")
            self._add(key, ApiClient(name), f"server.api_key_file={path}: line {number}")
            num_keys += 1
        if not num_keys:
            raise ConfigError(f"server.api_key_file={path} holds no key; expected lines `NAME KEY`")

    def _add(self, key: str, client: ApiClient, where: str) -> None:
        digest = _digest(key.encode())
        if any(known == digest for known, _ in self._clients):
            raise ConfigError(f"{where}: this key was given before")
        self._clients.append((digest, client))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
