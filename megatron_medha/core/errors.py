"""The errors users can meet, and the checks of options. Our own bugs are assertions, not these."""

from __future__ import annotations

import math
from collections.abc import Sequence


class MedhaError(Exception):
    """Base of every error that is not a bug of ours."""


class ConfigError(MedhaError):
    """The configuration is wrong; the message names key, value and way out."""


class CheckpointError(MedhaError):
    """A checkpoint cannot be read; the message names file and key."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint is sound but its model is none we can run; the message says why."""


class RankError(MedhaError):
    """A rank died, hung or refused its work."""


class DependencyError(MedhaError):
    """An optional package is missing; the message says how to install it."""


def check_member(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError for another value than these."""
    if value not in allowed:
        raise ConfigError(f"{key}={value}: not known; use one of {', '.join(allowed)}")


def check_range(key: str, value: float | None, low: float, high: float) -> None:
    """Raises ConfigError for a number outside of [low, high]; None is in any range."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        raise ConfigError(f"{key}={value:.10g}: must be between {low:.10g} and {high:.10g}")


def check_ranges(prefix: str, config: object, low: float, high: float, *keys: str) -> None:
    """check_range of these fields of a configuration."""
    for key in keys:
        check_range(f"{prefix}.{key}", getattr(config, key), low, high)
