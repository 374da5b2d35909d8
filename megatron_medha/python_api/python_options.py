"""From keyword arguments and values of Python to the options of `medha serve`: the same keys, flags and errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_medha.cli.parts.known_flags import known_flags, with_keys
from megatron_medha.cli.parts.model_words import with_sizes
from megatron_medha.cli.serve import with_local_model
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import compose, freeze, option_names
from megatron_medha.options.serve_options import ServeConfig, ServeOptions, serve_config

_PLAIN = re.compile(r"(?!(?:null|true|false|inf|nan)$)[A-Za-z_/][\w./:@%+-]*", re.ASCII | re.IGNORECASE)
# Of the HTTP server: there is none.
_ADDRESS_KEYS = re.compile(r"server\.(host|port|tls_\w+|api_key\w*|admin_key|allow_unauthenticated|allowed_\w+)(?==)")
_GROUPS_AND_KEYS = frozenset(field.name for field in fields(ServeOptions))


def python_serve_config(checkpoint: str | Path | None, options: Mapping[str, Any]) -> ServeConfig:
    """The checked configuration. Raises ConfigError naming keys, values and ways out.

    options: keys like "parallel.tp", groups like scheduler="fcfs" or parallel={"tp": 2}, names of vLLM's and SGLang's
    arguments like tensor_parallel_size, and config_dir: a folder of options of the user's own.
    """
    given = dict(options)
    config_dir = given.pop("config_dir", None)
    config_dir = None if config_dir is None else Path(config_dir).expanduser()
    model = given.get("model")
    if (
        checkpoint is None
        and isinstance(model, str | Path)
        and given.get("runtime") != "sim"
        and str(model) not in option_names("model", config_dir)
    ):
        # vLLM's name for the checkpoint; here a group, whose options are sizes.
        checkpoint = given.pop("model")
    if checkpoint is not None:
        given = {"checkpoint": checkpoint, **given}
    words = with_sizes(with_keys([word for key, value in given.items() for word in _words(key, value)]))
    for word in words:
        if (match := _ADDRESS_KEYS.match(word)) is not None:
            raise ConfigError(f"{match[0]}: nothing listens on an address here; `medha serve` does")
    if not any(word.startswith("log_level=") for word in words):
        words.append("log_level=warning")
    composed = compose("serve", ServeOptions, words, config_dir)
    return serve_config(with_local_model(freeze(composed, ServeOptions)))


def _words(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner, one in value.items():
            yield from _words(f"{key}.{inner}", one)
    elif "." in key or key in _GROUPS_AND_KEYS:
        yield f"{key}={_text(value)}"
    elif _is_flag(key):
        yield f"{_flag(key)}={_flag_text(value)}"
    else:
        yield f"{key}={_text(value)}"  # the composer says which key is near


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _is_flag(key: str) -> bool:
    return any(_flag(key) in flag.spellings for flag in known_flags())


def _flag_text(value: Any) -> str:
    """A value as a command line has it: lists with commas, texts without quotes."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str() | Path():
            return str(value)
        case Sequence():
            return ",".join(map(_flag_text, value))
        case _:
            return str(value)


def _text(value: Any) -> str:
    """A value as it is written behind key=."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Enum():
            return _text(value.value)
        case int() | float():
            return str(value)
        case str() | Path():
            text = str(value)
            return text if _PLAIN.fullmatch(text) else _quoted(text)
        case Sequence():
            return f"[{','.join(map(_text, value))}]"
        case _:
            return _quoted(str(value))


def _quoted(text: str) -> str:
    # Hydra knows no other escapes than of quotes, and of backslashes before one.
    return '"' + re.sub(r'(\\*)("|$)', lambda at: at[1] * 2 + ("\\" + at[2] if at[2] else ""), text) + '"'
