"""Fields of the configs of others that are read, needed or harmless: known_fields.toml, which lists them."""

from __future__ import annotations

import importlib.resources
import tomllib
from typing import Any

KNOWN_FIELDS: dict[str, dict[str, Any]] = tomllib.loads(
    importlib.resources.files("megatron_medha.models").joinpath("known_fields.toml").read_text("utf-8")
)


def names_of(source: str, key: str) -> frozenset[str]:
    """The names under a key of a source's section."""
    return frozenset(KNOWN_FIELDS[source][key].split())
