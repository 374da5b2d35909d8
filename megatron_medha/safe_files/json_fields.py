"""Fields of a JSON object in a file, read with their type; errors name file and key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.safe_files.checkpoint_files import read_json_object, shown


class JsonFields:
    """A JSON object whose fields are read with their type; errors name file and key."""

    def __init__(self, path: Path, fields: Mapping[str, Any], where: str = "") -> None:
        self.path = path
        self.fields = fields
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; the default when absent or null."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; the default when absent or null."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false; the default when absent or null."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def within(self, key: str) -> JsonFields:
        """The object under that key; empty when absent or null."""
        value = self.fields.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return JsonFields(self.path, value, f"{self._where}{key}.")

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error to raise when that key holds nothing we can read."""
        return CheckpointError(f"{self.path}: {self._where}{key[:80]}={shown(self.fields.get(key))} must be {wanted}")

    def unsupported(self, key: str, why: str) -> UnsupportedModelError:
        """The error to raise when that key asks for what we cannot run."""
        stated = f"{self._where}{key[:80]}={shown(self.fields.get(key))}"
        return UnsupportedModelError(f"{self.path}: {stated} is not supported: {why}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {self._where}{key} is missing")
        return value


def read_json(path: Path) -> JsonFields:
    """The object in that file. Raises CheckpointError when it cannot be read or is none."""
    return JsonFields(path, read_json_object(path))
