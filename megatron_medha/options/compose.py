"""Composes conf/ and the words of a command line into one frozen config class, or says all that is wrong with them.

conf/ is laid out for Hydra, and words are written as for Hydra; `-m` is Hydra's own. One configuration needs little of
it: an option of each group, on top of the options that it names in its `defaults`, and single keys on top of those.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from megatron_medha.core.errors import ConfigError
from megatron_medha.options.option_errors import describe, hints_of, nearest, suggest_key, type_at, without_none
from megatron_medha.options.override_words import GivenOption, read_words
from megatron_medha.options.references import resolved
from megatron_medha.options.renamed_keys import current_key, current_words
from megatron_medha.options.yaml_text import to_yaml, yaml_values
from megatron_medha.system.secret_values import HIDDEN, is_secret_name

T = TypeVar("T")

CONF_MODULE = "megatron_medha.conf"
_MISSING = "???"
_PACKAGE = re.compile(r"^#\s*@package", re.MULTILINE)
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclasses.dataclass(frozen=True, slots=True)
class Composed:
    """A configuration as plain values, in which ${...} may stand."""

    values: dict[str, Any]
    shown: dict[str, str]  # key -> how to name it in an error: the word that set it, or the file of the user's


def compose(name: str, config_class: type, words: Sequence[str], config_dir: Path | None = None) -> Composed:
    """conf/<name>.yaml with the user's words; config_dir adds options of the user's own.

    Raises ConfigError for whatever does not fit `config_class`, all of it at once.
    """
    if config_dir is not None:
        _check_config_dir(config_dir, config_class)
    given, errors = read_words(current_words(words))
    composition = _Composition(config_class, config_dir, errors)
    composition.add_command(name, given)
    if errors:
        raise ConfigError("\n".join(errors))
    return Composed(composition.values, composition.shown)


def freeze(composed: Composed, config_class: type[T]) -> T:
    """The composed configuration as a frozen object. Raises ConfigError for missing values and bad combinations."""
    errors: list[str] = []
    values = resolved(composed.values)
    options = _frozen(config_class, values, composed.shown, "", errors)
    if errors:
        raise ConfigError("\n".join(errors))
    assert isinstance(options, config_class)
    return options


def as_yaml(composed: Composed, resolves: bool) -> str:
    """The composed configuration without secrets; with `resolves`, ${...} is replaced by what it refers to."""
    return to_yaml(resolved(composed.values) if resolves else composed.values)


def option_names(group: str, config_dir: Path | None = None) -> list[str]:
    """The options of a group, as files under conf/ and of the user's own."""
    homes = [importlib.resources.files(CONF_MODULE), *([] if config_dir is None else [config_dir])]
    files = [item for home in homes if (home / group).is_dir() for item in (home / group).iterdir()]
    return sorted(item.name.removesuffix(".yaml") for item in files if item.name.endswith(".yaml"))


class _Composition:
    """Values of a config class, set one after another; `errors` collects what does not fit."""

    def __init__(self, config_class: type, config_dir: Path | None, errors: list[str]) -> None:
        self.values = _defaults_of(config_class)
        self.shown: dict[str, str] = {}
        self._class = config_class
        self._config_dir = config_dir
        self._errors = errors

    def add_command(self, name: str, given: Sequence[GivenOption]) -> None:
        """What conf/<name>.yaml says, with the options that were chosen, and then the keys that were given."""
        defaults, own = self._read(f"{name}.yaml")
        options = {group: option for default in defaults for group, option in default.items()}
        keys: list[GivenOption] = []
        for one in given:
            if "." not in one.key and dataclasses.is_dataclass(type_at(self._class, one.key)):
                options[one.key] = one.text if one.text is not None else one.value
                self.shown[one.key] = one.word
            else:
                keys.append(one)
        for group, option in options.items():
            self._add_option(group, option)
        self._merge(own, "")
        for one in keys:
            self._set(one)

    def _add_option(self, group: str, option: Any) -> None:
        known = option_names(group, self._config_dir)
        all_of_it = ", ".join(known)
        word = self.shown.pop(group, f"{group}={option}")
        if not isinstance(option, str) or option.lower() == "null":
            self._errors.append(f"{word}: {group} is one of {all_of_it}; single keys are set as {group}.KEY=VALUE")
        elif option not in known:
            near = nearest(option, known)
            self._errors.append(f"{word}: unknown option; {near}{group} is one of {all_of_it}")
        else:
            defaults, own = self._read(f"{group}/{option}.yaml")
            for base in defaults:
                self._add_option(group, base)
            self._merge(own, f"{group}.", "" if self._is_ours(f"{group}/{option}.yaml") else f"{group}/{option}.yaml")

    def _is_ours(self, name: str) -> bool:
        return self._config_dir is None or not (self._config_dir / name).is_file()

    def _read(self, name: str) -> tuple[list[Any], dict[str, Any]]:
        """What a file builds on, and its own keys. Hydra's other ways of building are refused, not passed over."""
        home = importlib.resources.files(CONF_MODULE) if self._is_ours(name) else self._config_dir
        assert home is not None
        try:
            text = (home / name).read_text(encoding="utf-8")
            values = yaml_values(text)
        except ValueError as error:
            why = "is not UTF-8; save it so" if isinstance(error, UnicodeDecodeError) else error
            self._errors.append(f"{name} {why}")
            return [], {}
        defaults = values.pop("defaults", None) or []
        is_command = "/" not in name
        others = [one for one in defaults if one != "_self_" and isinstance(one, dict) != is_command]
        if others or _PACKAGE.search(text) or "_self_" in defaults[:-1]:
            self._errors.append(f"{name}: only -m knows packages and defaults like {others or '_self_ before others'}; "
                                "name options of the same group, what they say comes first")  # fmt: skip
        return [one for one in defaults if one != "_self_" and one not in others], values

    def _merge(self, values: dict[str, Any], prefix: str, file: str = "") -> None:
        for name, value in values.items():
            place = f" (in {file})" if file else ""
            old = f"{prefix}{name}"
            key = current_key(old, value, f"{old}={value}{place}")
            if key is None:
                continue
            if key != old and key.rpartition(".")[2] in values:
                self._errors.append(f"{old}{place}: an old name of {key}, which is there too; leave {name} out")
            kind = without_none(type_at(self._class, key))
            if kind is None:
                self._errors.append(f"{key}{place}: unknown key; {suggest_key(key, self._class)}")
            elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
                self._put(key, self._get(key) or _defaults_of(kind))
                self._merge(value, f"{key}.", file)
            else:
                self._put(key, value)
                if file:
                    self.shown[key] = f"{key}={value}{place}"

    def _set(self, one: GivenOption) -> None:
        kind = type_at(self._class, one.key)
        if kind is None:
            self._errors.append(self._no_such_key(one))
            return
        if (outer := self._null_outer(one.key)) is not None:
            self._errors.append(f"{one.word}: cannot be composed ({outer} is null); set the outer key first")
            return
        bare = without_none(kind)
        value = one.value
        if one.text is not None and value is not None and (bare is Path or bare is str or _is_enum(bare)):
            value = one.text
        elif isinstance(value, dict) and dataclasses.is_dataclass(bare):
            self._put(one.key, self._get(one.key) or _defaults_of(bare))
            self._merge(value, f"{one.key}.")
            return
        self._put(one.key, value)
        self.shown[one.key] = one.word
        if "${" not in str(value):
            try:
                _fitted(kind, value)
            except ValueError as error:
                self._errors.append(f"{one.word}: {error}")

    def _no_such_key(self, one: GivenOption) -> str:
        parts = one.key.split(".")
        for end in range(1, len(parts)):
            outer = ".".join(parts[:end])
            kind = type_at(self._class, outer)
            if kind is not None and not dataclasses.is_dataclass(without_none(kind)):
                return f"{one.word}: {outer} has no keys; it must be {describe(kind)}"
        if (null := self._null_outer(one.key)) is not None:
            return f"{one.word}: cannot be composed ({null} is null); set the outer key first"
        word = one.word.lstrip("+")
        return f"{word}: unknown key; {suggest_key(one.key, self._class)}"

    def _null_outer(self, key: str) -> str | None:
        """The outermost part of a key that is null, which has no keys to set."""
        values: Any = self.values
        parts = key.split(".")
        for end, part in enumerate(parts[:-1], 1):
            values = values.get(part, {}) if isinstance(values, dict) else {}
            if values is None:
                return ".".join(parts[:end])
        return None

    def _get(self, key: str) -> Any:
        return functools.reduce(lambda values, part: values[part], key.split("."), self.values)

    def _put(self, key: str, value: Any) -> None:
        outer, _, last = key.rpartition(".")
        (self._get(outer) if outer else self.values)[last] = value


def _defaults_of(config_class: Any) -> dict[str, Any]:
    """Every key of a config class with its default as plain value, or ???."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        kind = hints_of(config_class)[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = _defaults_of(kind)
        elif field.default is dataclasses.MISSING:
            values[field.name] = _MISSING
        else:
            values[field.name] = msgspec.to_builtins(field.default, enc_hook=str)
    return copy.deepcopy(values)


def _frozen(config_class: Any, values: dict[str, Any], shown: dict[str, str], prefix: str, errors: list[str]) -> Any:
    """The values as the class, or None with what is wrong in errors."""
    num_errors = len(errors)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        key, kind = f"{prefix}{name}", hints_of(config_class)[name]
        bare = without_none(kind)
        if value == _MISSING:
            errors.append(f"{key} is missing; give it as {key}=VALUE")
        elif dataclasses.is_dataclass(bare) and isinstance(value, dict):
            fields[name] = _frozen(bare, value, shown, f"{key}.", errors)
        else:
            try:
                fields[name] = _fitted(kind, value)
            except ValueError as error:
                plain = f"{key}={HIDDEN if is_secret_name(key) else value}"
                errors.append(f"{shown.get(key, plain)}: {error}")
    if len(errors) > num_errors:
        return None
    try:
        return config_class(**fields)
    except ConfigError as error:
        errors.append(str(error))
        return None


def _fitted(kind: Any, value: Any) -> Any:
    """The value as what a key holds. ValueError, saying what it must be."""
    bare = without_none(kind)
    if bare is Path and value == "":  # checkpoint=$UNSET; a Path would make the current directory of it
        raise ValueError(f"expected a path, got an empty text; it must be {describe(kind)}")
    try:
        return msgspec.convert(_read_as(bare, value), kind, dec_hook=_as_path)
    except (msgspec.ValidationError, ValueError):
        raise ValueError(f"it must be {describe(kind)}") from None


def _read_as(kind: Any, value: Any) -> Any:
    """What a text, from quotes or the environment, is as a number, and a number as a text. ValueError if it is none."""
    if isinstance(value, str) and kind in (int, float):
        return kind(value)
    if isinstance(value, str | int) and kind is bool:
        return _BOOLS.get(str(value).lower(), value)
    if isinstance(value, int | float) and not isinstance(value, bool) and kind is str:
        return str(value)
    if isinstance(value, list) and get_origin(kind) is tuple:
        return [_read_as(get_args(kind)[0], item) for item in value]
    return value


def _as_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _check_config_dir(directory: Path, config_class: type) -> None:
    if not directory.is_dir():
        raise ConfigError(f"--config-dir {directory}: no such directory")
    for field in dataclasses.fields(config_class):
        if (directory / field.name).is_dir() and not dataclasses.is_dataclass(type_at(config_class, field.name)):
            # Under -m, Hydra would take the key for a group whose options are in there.
            raise ConfigError(f"--config-dir {directory}: "
                f"its folder {field.name} has the name of a key; use another one"
            )
    ours = importlib.resources.files(CONF_MODULE)
    for path in sorted(directory.rglob("*.yaml")):
        name = path.relative_to(directory)
        if ours.joinpath(*name.parts).is_file():
            raise ConfigError(f"--config-dir {directory}: {name} has the name of an option that exists; rename it")
