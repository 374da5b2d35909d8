"""Options as YAML, read and written as Hydra does it: 1e-3 is a number, a key stands once, secrets are not written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_medha.system.secret_values import without_secrets


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, without secrets."""
    return yaml.dump(without_secrets(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_values(text: str) -> dict[str, Any]:
    """YAML as plain values. ValueError if it is none, or holds no keys."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values or {}, dict):
        raise ValueError("holds no keys with values")
    return values or {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 in which 1e-3 is a number, as it is to Hydra."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Two of one key are an error."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key}", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would take for a number."""


_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$")
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
