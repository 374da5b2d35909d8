"""What ${...} in options refers to: the environment, this machine, and whatever else OmegaConf knows."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

from megatron_medha.core.errors import ConfigError
from megatron_medha.system import machine

# For these OmegaConf need not be imported.
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,([^{}$\\'\"]*))?\}")
_FROM_MACHINE = re.compile(r"\$\{machine:(\w+)\}")


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The values without ${...}. Raises ConfigError for one that leads nowhere."""
    found_all = copy.deepcopy(values)
    errors: list[str] = []
    for holder, place, key in _texts(found_all, ""):
        if (named := _FROM_MACHINE.fullmatch(holder[place])) is not None:
            holder[place] = _of_this_machine(named[1])
        elif (named := _FROM_ENVIRONMENT.fullmatch(holder[place])) is not None:
            name, default = named[1], named[2]
            if name not in os.environ and default is None:
                errors.append(f"{key}: environment variable '{name}' not found; set {key}=VALUE, or {name}")
            default = None if default is None or default.strip() == "null" else default.strip()
            holder[place] = os.environ.get(name, default)
    if errors:
        raise ConfigError("\n".join(errors))
    return _resolved_by_omegaconf(found_all) if any(_texts(found_all, "")) else found_all


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


def _texts(holder: Any, prefix: str) -> Iterator[tuple[Any, Any, str]]:
    """Where a text with ${ stands: what holds it, where in there, and its key."""
    for place, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        if isinstance(value, dict | list):
            yield from _texts(value, f"{prefix}{place}.")
        elif isinstance(value, str) and "${" in value:
            yield holder, place, f"{prefix}{place}"


def _of_this_machine(name: str) -> float:
    return {"flops_per_s": machine.cpu_flops_per_s, "memory_bytes_per_s": machine.memory_bytes_per_s}[name]()
