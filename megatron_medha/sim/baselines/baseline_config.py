"""Options that make our scheduler behave as others do: for comparisons in simulations, and never for serving."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from enum import Enum

from megatron_medha.core.errors import ConfigError, check_ranges
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig


class OutputLengthSource(Enum):
    """Sources of a predicted completion length."""

    ORACLE = "oracle"  # max_output_tokens is the length: true in simulations and with ignore_eos
    MEAN = "mean"      # the mean of the completions that have ended so far
    NOISY = "noisy"    # the oracle times a lognormal error, the same for the same request: a trained predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineConfig(SchedulerConfig):
    """The scheduler's options, and those of systems that it is compared with; as it stands, our own."""

    max_partial_prefills: int | None = None  # prompts begun and not ended; None: any number
    max_long_partial_prefills: int | None = None  # of those, prompts with more than short_prompt_tokens left
    reserved_share: float = 0.0              # of each step, kept free of prompts longer than short_prompt_tokens
    short_prompt_tokens: int = 8192          # prompts up to here may use the reserved share, and are not long
    output_lengths: OutputLengthSource = OutputLengthSource.MEAN  # what policy=ssjf predicts
    output_error: float = 0.5                # of output_lengths=noisy: standard deviation of the logarithm

    def __post_init__(self) -> None:
        SchedulerConfig.__post_init__(self)
        check_ranges("scheduler", self, 1, 1 << 20, "max_partial_prefills", "max_long_partial_prefills")
        check_ranges("scheduler", self, 0.0, 0.95, "reserved_share")
        check_ranges("scheduler", self, 1, 1 << 40, "short_prompt_tokens")
        check_ranges("scheduler", self, 0.0, 10.0, "output_error")

    def _policies(self) -> Collection[str]:
        return (*POLICIES, *BASELINE_POLICIES)

    @property
    def has_limits(self) -> bool:
        """Whether prefills are limited as ours never are."""
        return any(getattr(self, key) for key in _LIMITS)

    @property
    def reduced(self) -> SchedulerConfig:
        """The same, without options that have no effect: a plain SchedulerConfig where it asks for no baseline."""
        if self.has_limits or self.policy in BASELINE_POLICIES:
            return self
        return SchedulerConfig(**{each.name: getattr(self, each.name) for each in fields(SchedulerConfig)})


BASELINE_POLICIES = ("ssjf", "qlm")
_LIMITS = ("max_partial_prefills", "max_long_partial_prefills", "reserved_share")  # none: None or 0


def check_serves(config: SchedulerConfig) -> None:
    """Raises ConfigError for a baseline: it is compared with in simulations, and serves nobody."""
    if isinstance(config, BaselineConfig):
        keys = ["policy"] if config.policy in BASELINE_POLICIES else [key for key in _LIMITS if getattr(config, key)]
        given = " ".join(f"scheduler.{key}={getattr(config, key)}" for key in keys)
        raise ConfigError(
            f"{given}: a baseline, for comparisons under medha simulate and medha plan; choose another scheduler=, "
            f"or one of the policies {', '.join(POLICIES)}"
        )
