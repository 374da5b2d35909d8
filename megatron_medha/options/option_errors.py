"""What a message about a wrong option says: what the value must be, or which key was meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from megatron_medha.core.errors import ConfigError


def suggest_key(key: str, config_class: type) -> str:
    """The nearest key to one that does not exist, or those there are."""
    keys = _all_keys(config_class)
    parent, _, last = key.rpartition(".")
    siblings = [found.rpartition(".")[2] for found in keys if found.rpartition(".")[0] == parent]
    if parent and siblings:
        near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
        if near:
            return f"did you mean {parent}.{near[0]}?"
        elsewhere = [found for found in keys if found.rpartition(".")[2] == last]
        if elsewhere:
            return f"did you mean {elsewhere[0]}?"
        return f"{parent} has {', '.join(siblings)}"
    # A key without its group (port=8001), or a group that is none.
    same_name = [found for found in keys if found.rpartition(".")[2] == key]
    near = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    if type_at(config_class, parent) is not None:
        return f"{parent} has no keys of its own here"
    tops = [item.name for item in dataclasses.fields(config_class)]
    return f"{nearest(key.partition('.')[0], tops)}the first word is one of {', '.join(tops)}"


def _all_keys(config_class: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in [item.name for item in dataclasses.fields(config_class)]:
        keys.append(prefix + name)
        inner = without_none(hints_of(config_class)[name])
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys


def type_at(config_class: type, key: str) -> Any:
    """The type of a key like scheduler.policy; None if there is no such key."""
    kind: Any = config_class
    for part in key.split("."):
        kind = without_none(kind)
        if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
            return None
        kind = hints_of(kind).get(part)
    return kind


@functools.cache
def hints_of(config_class: type) -> dict[str, Any]:
    """The types of a class's fields, which annotations give as text that has to be evaluated."""
    return get_type_hints(config_class)


def without_none(kind: Any) -> Any:
    """T of `T | None`, else the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return inner[0] if len(inner) == 1 else kind
    return kind


def describe(kind: Any) -> str:
    """What a value of this type is written like, in words."""
    bare = without_none(kind)
    or_null = "" if bare is kind else " or null"
    if get_origin(bare) is tuple:
        return f"a list, like [a,b]{or_null}"
    if get_origin(bare) in (Union, types.UnionType):
        return f"{' or '.join(describe(part) for part in get_args(bare) if part is not type(None))}{or_null}"
    if get_origin(bare) is Literal:
        return ", ".join(map(str, get_args(bare)))
    if isinstance(bare, type) and issubclass(bare, Enum):
        return f"one of {', '.join(str(member.value) for member in bare)}"
    if dataclasses.is_dataclass(bare):
        return f"one of the group's options, or set its keys one by one{or_null}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(bare, str(bare)) + or_null


def nearest(word: str, known: Sequence[str]) -> str:
    """ "did you mean ...? " for a likely misspelling, else nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]}? " if found else ""


def check_http_url(key: str, url: str) -> None:
    """Raises ConfigError for what is no address of a server."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, brackets that do not close
        is_address = False
    if not is_address:
        raise ConfigError(f"{key}={url} must look like http://127.0.0.1:8000")
