"""Words of a command line like scheduler.policy=fcfs, read as Hydra reads them; Hydra itself reads the unusual ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_medha.core.errors import ConfigError

# Values for which Hydra need not be imported, which takes half a second: texts and numbers without a meaning of their
# own in its grammar, quoted texts without escapes, and lists of such.
_WORD = re.compile(r"(?:\+{0,2})([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.ASCII | re.DOTALL)
_PLAIN = re.compile(r"[\w./:@%+|-]*", re.ASCII)
_QUOTED = re.compile(r"'([^'\\$]*)'|\"([^\"\\$]*)\"")
_LIST = re.compile(r"\[([^\[\]{}()'\"\\$]*)\]")
_INT = re.compile(r"[+-]?(?:0|[1-9](?:_?\d)*)", re.ASCII)
_FLOAT = re.compile(
    r"[+-]?(?:(?:(?:0|[1-9](?:_?\d)*)?\.\d(?:_?\d)*|(?:0|[1-9](?:_?\d)*)\.?)(?:[eE][+-]?\d(?:_?\d)*)?|inf|nan)",
    re.ASCII | re.IGNORECASE,
)
_WORDS = {"null": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class GivenOption:
    """One word: a key, or a group, and what it is set to."""

    key: str
    value: Any
    word: str         # as it was given
    text: str | None  # of a value that is no list and not quoted, for keys that take text: 1e5 may be a name


def read_word(word: str) -> GivenOption:
    """Raises ConfigError for what is no assignment of one value."""
    match = _WORD.fullmatch(word)
    if match is not None:
        key, text = match[1], match[2].strip(" \t")
        if key.partition(".")[0] == "hydra":
            raise ConfigError(f"{word}: Hydra's own settings change nothing here (no output directory, no sweep)")
        try:
            return GivenOption(key, _value(text), word, text if _PLAIN.fullmatch(text) else None)
        except ValueError:
            pass
    return _read_by_hydra(word)


def _value(text: str) -> Any:
    """ValueError: only Hydra knows."""
    if quoted := _QUOTED.fullmatch(text):
        return quoted[1] if quoted[1] is not None else quoted[2]
    if listed := _LIST.fullmatch(text):
        parts = [part.strip(" \t") for part in listed[1].split(",")]
        return [] if parts == [""] else [_scalar(part) for part in parts if part or _fail()]
    return _scalar(text)


def _scalar(text: str) -> Any:
    if not _PLAIN.fullmatch(text):
        _fail()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _fail() -> bool:
    raise ValueError


def _read_by_hydra(word: str) -> GivenOption:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = word.partition("=")
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, OmegaConfBaseException) as error:
        if not equals and not word.startswith("~"):
            raise ConfigError(f"{word}: not of the form key=value") from error
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"""{word}: the value cannot be read ({reason}); put quotes around it, as in '{key}="{text}"'"""
        ) from error
    key = override.get_key_element()
    if override.is_sweep_override():
        raise ConfigError(
            f"{word}: several values, but only one can be; a list is written {key}=[a,b], "
            f"a text with a comma '{key}=\"a,b\"'"
        )
    if override.is_delete():
        raise ConfigError(f"{word}: nothing can be left out; give another value, where allowed null")
    return GivenOption(key.lstrip("+"), override.value(), word, None)


def read_words(words: Sequence[str]) -> tuple[list[GivenOption], list[str]]:
    """The words, and what is wrong with those that cannot be read."""
    given: list[GivenOption] = []
    errors: list[str] = []
    for word in words:
        try:
            given.append(read_word(word))
        except ConfigError as error:
            errors.append(str(error))
    return given, errors
