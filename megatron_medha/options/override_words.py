"""Words of a command line like scheduler.policy=fcfs, read as Hydra reads them; Hydra itself reads the unusual ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_medha.core.errors import ConfigError

_WORD = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.ASCII | re.DOTALL)
_PLAIN = re.compile(r"[\w./:@%+|-]*", re.ASCII)  # without a meaning of its own in Hydra's grammar
# Values for which Hydra need not be imported, which takes half a second.
_SIMPLE = (
    (re.compile(r"(?!(?:inf|nan)$)[a-z_/][\w./:@%+|-]*", re.ASCII | re.IGNORECASE), str),
    (re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII), int),
    (re.compile(r"-?(?:0|[1-9]\d*)\.\d+", re.ASCII), float),
)
_CONSTANTS = {"null": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class GivenOption:
    """One word: a key, or a group, and what it is set to."""

    key: str
    value: Any
    word: str         # as it was given
    text: str | None  # the value as given, unless it is quoted or a list, for keys that take text: 1e5 may be a name


def read_word(word: str) -> GivenOption:
    """Raises ConfigError for what is no assignment of one value."""
    match = _WORD.fullmatch(word)
    if match is None:
        return _read_by_hydra(word, None)
    key, text = match[1], match[2].strip(" \t")
    if key.partition(".")[0] == "hydra":
        raise ConfigError(f"{word}: Hydra's own settings change nothing here (no output directory, no sweep)")
    if text.lower() in _CONSTANTS:
        return GivenOption(key, _CONSTANTS[text.lower()], word, text)
    for pattern, kind in _SIMPLE:
        if pattern.fullmatch(text):
            return GivenOption(key, kind(text), word, text)
    return _read_by_hydra(word, text if _PLAIN.fullmatch(text) else None)


def _read_by_hydra(word: str, plain: str | None) -> GivenOption:
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
    return GivenOption(key.lstrip("+"), override.value(), word, plain)


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
