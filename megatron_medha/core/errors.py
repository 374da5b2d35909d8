"""The errors users can meet. Our own bugs are assertions, not these."""

from __future__ import annotations


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
