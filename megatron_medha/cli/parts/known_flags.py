"""Flags of other servers, read as the keys they are here. The table is known_flags.toml."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from megatron_medha.core.errors import ConfigError

_PLAIN = re.compile(r"[\w./:@%+|-]+", re.ASCII)  # as it stands after key=
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


class KnownFlag(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the table; its head says what the fields mean."""

    names: str
    key: str = ""
    set: str = ""
    write: str = ""
    note: str = ""
    says: str = ""
    is_list: bool = False
    takes_value: bool = False
    values: dict[str, str] = {}

    @property
    def spellings(self) -> list[str]:
        """Every name."""
        return self.names.split()

    @property
    def has_value(self) -> bool:
        """Whether a word with its value follows."""
        return bool(self.key or "{}" in self.write or self.takes_value)


@functools.cache
def known_flags() -> list[KnownFlag]:
    """The whole table."""
    text = importlib.resources.files("megatron_medha.cli.parts").joinpath("known_flags.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text)["flags"], list[KnownFlag])


def with_keys(words: Sequence[str]) -> list[str]:
    """The words with every known flag written as key=value. Raises ConfigError, all refusals at once."""
    found: list[str] = []
    errors: list[str] = []
    rest = iter([*words, None])
    word = next(rest)
    while word is not None:
        following = next(rest)
        name, equals, value = word.partition("=")
        flag = _flag_of(name) if word.startswith("-") else None
        if flag is None:
            found.append(word)
        elif flag.has_value and not equals:
            if following is None or _is_flag(following):
                errors.append(f"{word}: a value is missing; write {flag.key or word}=VALUE")
            else:
                found += _words_of(flag, f"{word} {following}", following, errors)
                following = next(rest)
        else:
            found += _words_of(flag, word, value, errors)
        word = following
    if errors:
        raise ConfigError("\n".join(errors))
    return found


def _flag_of(name: str) -> KnownFlag | None:
    name = name.replace("_", "-")
    return next((flag for flag in known_flags() if name in flag.spellings), None)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and re.fullmatch(r"-\d+(\.\d+)?", word) is None


def _words_of(flag: KnownFlag, typed: str, value: str, errors: list[str]) -> Iterator[str]:
    if flag.key:
        value = flag.values.get(value, value)
        yield f"{flag.key}={_list(value) if flag.is_list else quoted(value)}"
    elif flag.set:
        key, _, wanted = flag.set.partition("=")
        if value.lower() not in ("", *_TRUE, *_FALSE):
            errors.append(f"{typed}: a switch, which takes true or false; it sets {flag.set}")
        is_off = value.lower() in _FALSE
        yield f"{key}={'true' if (wanted == 'true') != is_off else 'false'}"
    elif flag.note:
        print(f"{typed}: without effect, {flag.note}", file=sys.stderr)
    elif flag.write:
        errors.append(f"{typed}: write {flag.write.replace('{}', value)}; {flag.says}")
    else:
        errors.append(f"{typed}: {flag.says}")


def quoted(value: str) -> str:
    """A value as it is written after key=."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _list(value: str) -> str:
    """Given as JSON, as vLLM's origins are, or with commas."""
    items: Any = None
    if value.startswith("["):
        try:
            items = json.loads(value)
        except ValueError:
            return value
    return f"[{','.join(quoted(str(item)) for item in items or value.split(','))}]"
