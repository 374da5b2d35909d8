"""The environment of processes that we start: without secrets, which they do not need and others could read there."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping

_SECRET_WORDS = frozenset({
    "KEY", "KEYS", "APIKEY", "TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL",
    "CREDENTIALS", "AUTH", "AUTHORIZATION", "COOKIE", "DSN",
})  # fmt: skip
# Of OpenTelemetry's exporters: HTTP headers, a key among them.
_SECRET_NAME = re.compile(r"OTEL_\w*HEADERS")
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_MIN_SECRET_CHARS = 8  # a shorter one is found in values that are none, such as numbers


def child_environment(secrets: Collection[str] = (), environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without variables that are named like a secret, hold a URL with a password, or one of `secrets`."""
    known = [secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS]
    return {
        name: value
        for name, value in environment.items()
        if not (
            _SECRET_WORDS & set(name.upper().split("_"))
            or _SECRET_NAME.fullmatch(name.upper())
            or _PASSWORD_IN_URL.search(value)
            or any(secret in value for secret in known)
        )
    }
