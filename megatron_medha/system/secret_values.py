"""Secrets: hidden wherever options are shown or written down, and not in the environment of processes we start."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

HIDDEN = "<not shown>"  # no key may hold a space: what is copied from a page with it is refused

_NAME = re.compile(r"(?i)(?:api|admin|secret|private|access)[_-]?ke?y|secret|passw|(?<!per[_-])(?<!tls[_-])key\w{0,2}$")
# As it is assigned, or as it stands in a mapping.
_KEY = re.compile(r"""[\w.-]+=|(?<=[{,])\s*["']?[\w.-]+["']?\s*:\s*""")
_VALUE = re.compile(r"""<not\ shown>|"[^"]*"|'[^']*'|\$\{[^}]*\}|[^\s,;\[\]{}'"]+?(?=:?(?:[\s,;\[\]{}'"]|$))""")
_PUNCTUATION = re.compile(r"[\s,:;\[\]{}'\"]+")
_MIN_CHARS = 4  # a shorter one is part of too many words to be hidden wherever it stands
# Of environment variables.
_SECRET_WORDS = frozenset({
    "KEY", "KEYS", "APIKEY", "TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL",
    "CREDENTIALS", "AUTH", "AUTHORIZATION", "COOKIE", "DSN",
})  # fmt: skip
# Of OpenTelemetry's exporters: HTTP headers, a key among them.
_SECRET_NAME = re.compile(r"OTEL_\w*HEADERS")
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_MIN_SECRET_CHARS = 8  # a shorter one is found in values that are none, such as numbers


def is_secret_name(key: str) -> bool:
    """Whether a key like server.api_key, or a misspelt one, holds a secret. Files that hold some are none."""
    last = key.rpartition(".")[2]
    return _NAME.search(last) is not None and not last.lower().endswith("file")


def without_secrets(values: Any, key: str = "") -> Any:
    """Nested options with secrets hidden; ${...}, which only names one, stays."""
    if isinstance(values, dict):
        return {name: without_secrets(value, str(name)) for name, value in values.items()}
    if isinstance(values, list):
        return [without_secrets(value, key) for value in values]
    if values is None or not isinstance(values, str | int | float) or isinstance(values, bool):
        return values
    if is_secret_name(key):
        return values if _is_reference(str(values)) else HIDDEN
    return _hide_assignments(values) if isinstance(values, str) else values


def hide_secrets(text: str, words: Sequence[str] = ()) -> str:
    """A text, such as a message about a command line, without the secrets in it and those that its words hold."""
    text = _hide_assignments(text)
    for place, word in enumerate(words):
        key, has_value, value = word.partition("=")
        if not has_value and word.startswith("-"):
            value = words[place + 1] if place + 1 < len(words) else ""
        if not is_secret_name(key.lstrip("-+~")) or _is_reference(value):
            continue
        for part in (value, *_PUNCTUATION.split(value)):
            if len(part) >= _MIN_CHARS and not _is_reference(part):
                text = text.replace(part, HIDDEN)
    return text


def _hide_assignments(text: str) -> str:
    """Hide the values of key=value and {key: value}, wherever in a text they stand."""
    shown, end = "", 0
    for key in _KEY.finditer(text):
        value = _VALUE.match(text, key.end())
        name = key[0].strip(" \t\"':=")
        if value is None or key.start() < end or not is_secret_name(name):
            continue
        if not key[0].endswith("=") and text.rfind("{", 0, key.start()) < text.rfind("}", 0, key.start()):
            continue  # a sentence: "..., server.api_key: this key was given before"
        if not _is_reference(value[0].strip("\"'")):
            shown, end = f"{shown}{text[end:key.end()]}{HIDDEN}", value.end()
    return shown + text[end:]


def _is_reference(value: str) -> bool:
    # With a default behind a comma, it holds the secret itself.
    if value in ("null", "???", "VALUE", "value", HIDDEN):
        return True
    return re.fullmatch(r"\$\{[^,}]*(,\s*null)?\}", value) is not None


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
