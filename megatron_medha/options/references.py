"""What ${...} in options refers to: the environment, this machine, and whatever else OmegaConf knows."""

from __future__ import annotations

import os
import re
from typing import Any

from megatron_medha.core.errors import ConfigError
from megatron_medha.system import machine

# For these OmegaConf need not be imported, which takes a quarter of a second.
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+),null\}")
_FROM_MACHINE = re.compile(r"\$\{machine:(\w+)\}")


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The values without ${...}. Raises ConfigError for one that leads nowhere."""
    found = _without_simple_references(values)
    return _resolved_by_omegaconf(found) if "${" in str(found) else found


def _without_simple_references(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_simple_references(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_simple_references(one) for one in value]
    if isinstance(value, str) and (named := _FROM_MACHINE.fullmatch(value)):
        return _of_this_machine(named[1])
    if isinstance(value, str) and (named := _FROM_ENVIRONMENT.fullmatch(value)):
        return os.environ.get(named[1])
    return value


def _resolved_by_omegaconf(values: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("machine", _of_this_machine, replace=True)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "the configuration"
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"{key}: {reason}; set {key}=VALUE, or what it refers to") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _of_this_machine(name: str) -> float:
    return {"flops_per_s": machine.cpu_flops_per_s, "memory_bytes_per_s": machine.memory_bytes_per_s}[name]()
