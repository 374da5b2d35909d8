"""Hydra's part: composes conf/ and overrides into one frozen config class, or says in one line what is wrong.

Every way in which Hydra and OmegaConf refuse a configuration becomes a ConfigError "key=value: what; way out".
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import types
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_medha.core.errors import ConfigError
from megatron_medha.options.option_errors import (
    explain,
    explain_conversion,
    explain_resolution,
    first_line,
    type_at,
    way_out,
)
from megatron_medha.options.remembered_options import CONF_MODULE, decode_path
from megatron_medha.system import machine
from megatron_medha.system.secret_values import HIDDEN, is_secret_name, without_secrets

T = TypeVar("T")

OmegaConf.register_new_resolver(
    "machine",
    lambda name: {"flops_per_s": machine.cpu_flops_per_s, "memory_bytes_per_s": machine.memory_bytes_per_s}[name](),
    use_cache=True,
    replace=True,
)


def compose(name: str, config_class: type, overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """conf/<name>.yaml with the user's overrides, typed by `config_class`; config_dir adds options of the user's own.

    Raises ConfigError for whatever does not fit.
    """
    parsed = [_parse(text, config_class) for text in overrides]
    search: list[str] = []
    if config_dir is not None:
        _check_config_dir(config_dir, config_class)
        search.append(f"hydra.searchpath=[file://{config_dir.resolve()}]")
    register_schema(name, config_class)
    try:
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            return hydra_compose(name, [*search, *overrides])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, name, config_class, parsed)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config-dir {config_dir}: {_not_utf8(config_dir)} is not UTF-8; save it so") from error
    except (AssertionError, ValueError) as error:
        # Hydra 1.3.8 and OmegaConf 2.3 let these through, e.g. for model.shape.name=x while model.shape is null.
        given = " ".join(overrides) or f"conf/{name}.yaml"
        raise ConfigError(f"{given}: cannot be composed ({first_line(error)}); set the outer key first") from error


def freeze(config: DictConfig, config_class: type[T]) -> T:
    """The composed configuration as a frozen object. Raises ConfigError for missing values and bad combinations."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_resolution(error)) from error
    for key, value in _leaves(values):
        if type_at(config_class, key) is None:  # put there with +key=value, or by an option file's @package
            shown = HIDDEN if is_secret_name(key) else value
            raise ConfigError(f"{key}={shown}: there is no such key; {way_out(key, config_class)}")
        if value == "???":
            raise ConfigError(f"{key} is missing; give it as {key}=VALUE")
    try:
        return msgspec.convert(values, config_class, dec_hook=decode_path)
    except msgspec.ValidationError as error:
        raise ConfigError(explain_conversion(str(error), values, config_class)) from error


def plain_values(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as freeze() saw it."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def as_yaml(config: DictConfig, resolves: bool) -> str:
    """The composed configuration without secrets; with `resolves`, ${...} is replaced by what it refers to."""
    try:
        values = OmegaConf.to_container(config, resolve=resolves, enum_to_str=True)
        return OmegaConf.to_yaml(OmegaConf.create(without_secrets(values)))
    except OmegaConfBaseException as error:
        raise ConfigError(explain_resolution(error)) from error


def yaml_values(text: str) -> dict[str, Any]:
    """Composed options, as as_yaml() wrote them, as plain values."""
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def register_schema(name: str, config_class: type) -> None:
    """Let conf/<name>.yaml find the types of its keys, as <name>_schema."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema_of(config_class))


def schema_of(config_class: type) -> type:
    """The same fields for OmegaConf, which wants them mutable, enums as text and paths as text."""
    hints = get_type_hints(config_class)
    fields = []
    for item in dataclasses.fields(config_class):
        kind = _schema_type(hints[item.name])
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            default: Any = dataclasses.field(default_factory=kind)
        elif item.default is dataclasses.MISSING:
            default = dataclasses.field(default="???")
        elif isinstance(item.default, tuple):
            default = dataclasses.field(default_factory=functools.partial(list, item.default))
        elif isinstance(item.default, Enum):
            default = dataclasses.field(default=item.default.value)
        else:
            default = dataclasses.field(default=item.default)
        fields.append((item.name, kind, default))
    return dataclasses.make_dataclass(config_class.__name__, fields)


def option_names(group: str) -> list[str]:
    """The options of a group, as files under conf/."""
    directory = importlib.resources.files(CONF_MODULE) / group
    return sorted(item.name.removesuffix(".yaml") for item in directory.iterdir() if item.name.endswith(".yaml"))


def _schema_type(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        inner = [_schema_type(part) for part in get_args(kind) if part is not type(None)]
        return inner[0] | None if len(inner) == 1 else kind
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]]  # type: ignore[misc]  # a type made at run time
    if isinstance(kind, type) and issubclass(kind, Enum | Path):
        return str
    return schema_of(kind) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else kind


def _parse(text: str, config_class: type) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, OmegaConfBaseException) as error:
        if "=" not in text:
            raise ConfigError(f"{text}: not of the form key=value") from error
        raise ConfigError(
            f"{text}: the value cannot be read ({first_line(error)}); put quotes around it, "
            f"""as in '{text.partition("=")[0]}="{text.partition("=")[2]}"'"""
        ) from error
    key = override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(
            f"{text}: several values, but only one can be; a list is written {key}=[a,b], "
            f"a text with a comma '{key}=\"a,b\"'"
        )
    if key.split(".")[0] == "hydra":
        raise ConfigError(f"{text}: Hydra's own settings change nothing here (no output directory, no sweep)")
    if override.is_delete():
        raise ConfigError(f"{text}: nothing can be left out; give another value, where allowed null")
    is_group = "." not in key and dataclasses.is_dataclass(type_at(config_class, key))
    if is_group and not isinstance(override.value(), str):
        known = option_names(key)
        raise ConfigError(f"{text}: {key} is one of {', '.join(known)}; single keys are set as {key}.KEY=VALUE")
    return override


def _check_config_dir(directory: Path, config_class: type) -> None:
    if not directory.is_dir():
        raise ConfigError(f"--config-dir {directory}: no such directory")
    for field in dataclasses.fields(config_class):
        if (directory / field.name).is_dir() and not dataclasses.is_dataclass(type_at(config_class, field.name)):
            # Hydra would take the key for a group whose options are in there.
            raise ConfigError(f"--config-dir {directory}: "
                f"its folder {field.name} has the name of a key; use another one"
            )
    ours = importlib.resources.files(CONF_MODULE)
    for path in sorted(directory.rglob("*.yaml")):
        name = path.relative_to(directory)
        if ours.joinpath(*name.parts).is_file():
            raise ConfigError(f"--config-dir {directory}: {name} has the name of an option that exists; rename it")


def _not_utf8(directory: Path | None) -> Path:
    """The first option in there that is no text."""
    assert directory is not None, "our own options are UTF-8"
    for path in sorted(directory.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return path.relative_to(directory)
    raise AssertionError("every file in there is UTF-8")


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
