"""Keys that had another name, or were options, in the release before: still read for one release, with a warning."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_medha.core.errors import ConfigError

log = logging.getLogger(__name__)

RENAMED_KEYS = {
    "scheduler.max_saved_gift_steps": "scheduler.max_banked_steps",
    "server.head_timeout_s": "server.header_timeout_s",
    "server.is_open_to_all": "server.allow_unauthenticated",
    "server.logs_requests": "server.log_requests",
    "server.max_bodies_bytes": "server.max_total_body_bytes",
    "server.max_head_bytes": "server.max_header_bytes",
    "server.max_unread_tokens": "server.max_buffered_tokens",
    "server.refuses_late": "server.reject_late",
    "server.stalled_reader_timeout_s": "server.stalled_client_timeout_s",
    "server.tool_syntax": "server.tool_call_parser",
    "ends_server": "shutdown_server",
    "is_patient": "slow_tests",
    "max_tries": "max_attempts",
}
# Nobody set them: what they were by default is what they always are now. None: nothing reads it any more.
FIXED_KEYS: dict[str, float | None] = {
    "recovery.load_heartbeat_timeout_s": 60.0,
    "server.default_max_output_tokens": 16,
    "server.engine_check_s": None,
    "server.max_headers": 128,
    "server.max_logit_bias": 1024,
    "server.max_n": 128,
    "server.max_prompts": 2048,
    "server.max_regex_chars": 4096,
    "server.max_schema_chars": 65536,
    "server.max_stop_string_chars": 1024,
    "server.max_stop_strings": 16,
    "server.max_stop_token_ids": 128,
    "server.stop_timeout_s": 10.0,
    "tracking.timeline_s": 300.0,
    "max_gradient_norm": 1.0,
    "max_growth_mib": 64,
    "num_parallel": 16,
    "weight_decay": 0.1,
}
_WORD = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)


def current_key(key: str, value: object, place: str) -> str | None:
    """What a key is called today; None for one that is no option any more. Warns once of each old name.

    Raises ConfigError for a value other than the one that is always taken. place: what to name in the error.
    """
    if key in FIXED_KEYS:
        constant = FIXED_KEYS[key]
        why = "is no option any more" + ("" if constant is None else f", it is always {constant:g}") + "; leave it out"
        if constant is not None and not _is(constant, value):
            raise ConfigError(f"{place}: {key} {why}")
        _warn(f"{key} {why}")
        return None
    if key in RENAMED_KEYS:
        _warn(f"{key} is now {RENAMED_KEYS[key]}; the old name will be refused in the next release")
        return RENAMED_KEYS[key]
    return key


def current_words(words: Sequence[str]) -> list[str]:
    """Words of a command line with today's keys. Raises ConfigError for an old and a new name of one key together."""
    found: list[str] = []
    given: dict[str, str] = {}
    for word in words:
        if (match := _WORD.fullmatch(word)) is not None:
            plus, spelling, value = match.groups()
            if (key := current_key(spelling, value, word)) is None:
                continue
            if (before := given.setdefault(key, spelling)) != spelling:
                raise ConfigError(f"{before} and {spelling}: an old and a new name of one key; give {key} alone")
            word = f"{plus}{key}={value}"
        found.append(word)
    return found


def current_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options as an earlier release wrote them down, with today's keys; without a warning."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in FIXED_KEYS:
            inner = current_values(value, f"{key}.") if isinstance(value, dict) else value
            found[RENAMED_KEYS.get(key, key).removeprefix(prefix)] = inner
    return found


def _is(constant: float, value: object) -> bool:
    try:
        return float(str(value)) == constant
    except ValueError:
        return False


@functools.cache
def _warn(message: str) -> None:
    # Options are read before logging is set up: this is one plain line on stderr.
    log.warning("%s", message)
