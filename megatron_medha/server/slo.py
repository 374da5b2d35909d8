"""Classes of service: what a client may call its traffic, and what that means to the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_medha.core.errors import ConfigError

# OpenAI's service tiers, as names of ours.
CLASS_BY_TIER = {
    "auto": "", "default": "", "standard_only": "", "scale": "", "flex": "batch", "priority": "interactive",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """How requests of one class are scheduled. Whatever a request brings itself goes before this."""

    priority: int = 0                         # lower runs first, before slack is compared
    deadline_multiplier: float | None = None  # first-token deadline in units of the prompt's own work
    min_deadline_s: float | None = None       # no deadline is shorter

    def __post_init__(self) -> None:
        for name in ("deadline_multiplier", "min_deadline_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"slo_classes.*.{name}={value} must be above 0, or null for the scheduler's own")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """The classes. Work of a higher priority number runs in what the others leave, and in its progress share."""

    default_class: str = "standard"
    interactive: SloClass = SloClass(priority=-1)  # a person waits for it: before all others
    standard: SloClass = SloClass()                # what the scheduler's own settings say
    # Nobody watches: after all others, until its long deadline has passed; then the progress share moves it on.
    batch: SloClass = SloClass(priority=1, deadline_multiplier=20.0, min_deadline_s=60.0)

    def __post_init__(self) -> None:
        if self.default_class not in self.names:
            raise ConfigError(
                f"slo_classes.default_class={self.default_class}: not known; use one of {', '.join(self.names)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of all classes."""
        return tuple(field.name for field in fields(self) if field.name != "default_class")

    def class_of_tier(self, tier: str | None) -> str | None:
        """The class of OpenAI's service tier, or of a tier named as a class; "": the default; None: an unknown tier."""
        return tier if tier in self.names else CLASS_BY_TIER.get(tier or "auto")

    def find(self, name: str) -> SloClass:
        """The class of that name, one of names."""
        found: SloClass = getattr(self, name)
        return found
