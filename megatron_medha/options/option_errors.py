"""Why a configuration was refused, in one line: key=value, what is wrong with it, the way out."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf.errors import (
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)
from yaml import YAMLError

from megatron_medha.system.secret_values import HIDDEN, is_secret_name


def explain(error: Exception, name: str, config_class: type, overrides: Sequence[Override]) -> str:
    """Of an error of Hydra or OmegaConf while conf/<name>.yaml was composed."""
    chain = list(_chain(error))
    for found in chain:
        if isinstance(found, MissingConfigException):
            return _missing(found)
        if isinstance(found, YAMLError):
            return f"a file of the configuration is not YAML: {' '.join(str(found).split())}"
    cause = next((found for found in chain if isinstance(found, OmegaConfBaseException)), None)
    message = str(error)
    if isinstance(cause, InterpolationResolutionError | UnsupportedInterpolationType):
        return explain_resolution(cause)
    key = str(cause.full_key) if cause is not None and cause.full_key else ""
    override = next((found for found in overrides if found.key_or_group == key), None)
    if override is None:  # the message names the key that could not be overridden
        override = next((found for found in overrides if f"'{found.key_or_group}'" in message), None)
    where = re.match(r"In '([^']+)'", message)
    place = f" (in {where.group(1)}.yaml)" if where and override is None and where.group(1) != name else ""
    shown = _shown(override) if override is not None else f"{key}{place}"
    key = key or (override.key_or_group if override is not None else "")
    kind = type_at(config_class, key)
    if isinstance(cause, ValidationError) and kind is not None:
        return f"{shown}: {first_line(cause)}; it must be {_describe(kind)}"
    if key and kind is None:
        return f"{shown}: there is no such key; {way_out(key, config_class)}"
    return f"{shown or name}: {first_line(cause if cause is not None else error)}"


def _missing(error: MissingConfigException) -> str:
    path = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, option = path.rpartition("/")
    if not group:
        return first_line(error)
    known = sorted(error.options or [])
    return f"{group}={option}: there is no such option; {_nearest(option, known)}{group} is one of {', '.join(known)}"


def explain_resolution(error: Exception) -> str:
    """Of a ${...} that leads nowhere."""
    key = getattr(error, "full_key", None) or "the configuration"
    return f"{key}: {first_line(error)}; set {key}=VALUE, or what it refers to"


def explain_conversion(message: str, values: Any, config_class: type) -> str:
    """Of a message of msgspec, which names the place at its end."""
    what, _, path = message.partition(" - at `$.")
    key = path.rstrip("`")
    if not key:
        return what
    value = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    kind = type_at(config_class, key)
    value = HIDDEN if is_secret_name(key) else value
    return f"{key}={value}: {what[0].lower()}{what[1:]}; it must be {_describe(kind)}"


def way_out(key: str, config_class: type) -> str:
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
    return f"{_nearest(key.partition('.')[0], tops)}the first word is one of {', '.join(tops)}"


def _all_keys(config_class: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    hints = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        keys.append(prefix + item.name)
        inner = _without_none(hints[item.name])
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            keys += _all_keys(inner, f"{prefix}{item.name}.")
    return keys


def type_at(config_class: type, key: str) -> Any:
    """The type of a key like scheduler.policy; None if there is no such key."""
    kind: Any = config_class
    for part in key.split("."):
        kind = _without_none(kind)
        if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
            return None
        kind = _hints(kind).get(part)
    return kind


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    # A start asks for the type of every one of some hundred keys, and annotations are text that has to be evaluated.
    return get_type_hints(config_class)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return inner[0] if len(inner) == 1 else kind
    return kind


def _describe(kind: Any) -> str:
    bare = _without_none(kind)
    or_null = "" if bare is kind else " or null"
    if get_origin(bare) is tuple:
        return f"a list, like [a,b]{or_null}"
    if isinstance(bare, type) and issubclass(bare, Enum):
        return f"one of {', '.join(str(member.value) for member in bare)}"
    if dataclasses.is_dataclass(bare):
        return f"one of the group's options, or set its keys one by one{or_null}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(bare, str(bare)) + or_null


def _shown(override: Override) -> str:
    return override.input_line or override.key_or_group


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return str(error).strip().split("\n")[0].rstrip(".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _nearest(word: str, known: Sequence[str]) -> str:
    """ "did you mean ...? " for a likely misspelling, else nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]}? " if found else ""
