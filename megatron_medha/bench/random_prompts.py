"""Prompts of given lengths as token ids, different ones for every request, the same ones for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_medha.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRange:
    """Ids that prompts are drawn from. The defaults are in every vocabulary, those of bytes included."""

    lowest: int = 32
    highest: int = 126

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest:
            raise ConfigError(
                f"lowest_token={self.lowest}: must be between 0 and highest_token={self.highest}"
            )

    def prompt(self, num_tokens: int, seed: int, name: str) -> list[int]:
        """num_tokens ids, uniformly; no two prompts share a prefix worth caching."""
        draw = Random(f"{seed}/{name}")
        return draw.choices(range(self.lowest, self.highest + 1), k=num_tokens)
