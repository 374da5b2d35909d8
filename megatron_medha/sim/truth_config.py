"""How a simulated world may differ from what the cost model says."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import check_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthConfig:
    """How the world differs from what the cost model says; by default not at all."""

    linear_bias: float = 1.0     # factor on everything but attention
    attention_bias: float = 1.0  # factor on attention
    noise: float = 0.0           # standard deviation of the logarithm of a factor on each step and KVP rank

    def __post_init__(self) -> None:
        check_ranges("truth", self, 1e-3, 1e3, "linear_bias", "attention_bias")
        check_ranges("truth", self, 0.0, 2.0, "noise")
