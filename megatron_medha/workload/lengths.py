"""Prompt and output lengths of published workloads, as quantiles to draw from. No arrivals and no files here."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import exp, log
from random import Random

_PROBABILITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution of token counts by its quantiles at _PROBABILITIES, geometric in between.

    Between two quantiles the logarithm is interpolated: the means of the four tables below then are within 0.6% of
    those of the data they were taken from (linear interpolation: within 0.7%).
    """

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(_PROBABILITIES) and list(self.tokens) == sorted(self.tokens)

    def at(self, probability: float) -> int:
        """The length that this share of all lengths does not exceed; probability in [0, 1]."""
        index = min(max(bisect_right(_PROBABILITIES, probability), 1), len(_PROBABILITIES) - 1)
        p0, p1 = _PROBABILITIES[index - 1], _PROBABILITIES[index]
        low, high = log(self.tokens[index - 1]), log(self.tokens[index])
        return round(exp(low + (high - low) * (probability - p0) / (p1 - p0)))


# The mixes the Medha paper was measured with (project-etalon/etalon, merged_df_*_percent_long_context_mixed.csv,
# December 2024): ShareGPT4 conversations of up to 8K tokens, and issues and pull requests of large repositories.
SHORT_PROMPT = Quantiles((2, 29, 73, 377, 759, 1194, 1712, 2387, 3230, 4278, 5683, 6559, 7435, 8032))
SHORT_OUTPUT = Quantiles((2, 43, 85, 183, 273, 347, 415, 494, 582, 684, 836, 923, 997, 1024))
LONG_PROMPT = Quantiles(
    (100_600, 130_000, 161_000, 214_000, 276_000, 335_000, 400_000, 466_000, 557_000, 722_000, 840_000, 910_000,
     955_000, 997_000)
)  # fmt: skip
LONG_OUTPUT = Quantiles((61, 134, 191, 302, 379, 449, 522, 583, 643, 706, 792, 882, 1060, 1578))


def draw_mix(
    draw: Random, long_share: float, *, short_scale: float = 1.0, long_scale: float = 1.0, output_scale: float = 1.0
) -> tuple[int, int]:
    """Prompt and output tokens of one request of the mix, independent of each other, at least one of each.

    They are in the data too: correlation about 0.05 in both classes. The scales are factors on lengths, for machines
    slower than those the mix was made for; long_scale=2 gives the up to 2M tokens of the paper's 70B test.
    """
    if draw.random() < long_share:
        prompt, output = LONG_PROMPT.at(draw.random()) * long_scale, LONG_OUTPUT.at(draw.random())
    else:
        prompt, output = SHORT_PROMPT.at(draw.random()) * short_scale, SHORT_OUTPUT.at(draw.random())
    return max(1, round(prompt)), max(1, round(output * output_scale))
