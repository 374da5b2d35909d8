"""The cells there are: figures of each, and how they are asked for; lines of tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.lib.quantile import quantile


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar, and whether it is kept."""

    question: str
    figure: str
    bar: str
    is_kept: bool


class Results:
    """The cells, by server and load."""

    def __init__(self, cells: Iterable[dict[str, Any]]) -> None:
        self._cells = list(cells)

    @property
    def servers(self) -> list[str]:
        """Ours first, then by name."""
        names = {one["cell"]["server"] for one in self._cells}
        return sorted(names, key=lambda name: (not name.startswith("medha"), name))

    def settings(self) -> list[str]:
        """Model and instruction sets, as a line each; several only if cells of several runs were put together."""
        found = {(one["model"], one["instruction_sets"]) for one in self._cells if "model" in one}
        return [f"Model {model}; instruction sets {names}" for model, names in sorted(found)]

    def of(self, server: str, load: str) -> list[dict[str, Any]]:
        """All seeds."""
        return [one for one in self._cells if (one["cell"]["server"], one["cell"]["load"]) == (server, load)]

    def loads(self, kind: str) -> list[str]:
        """Those measured at all, shortest first."""
        found = {load for one in self._cells if (load := one["cell"]["load"]).startswith(kind)}
        return sorted(found, key=lambda load: [int(part) for part in load.split("-")[1:]])

    def rate(self, server: str, load: str) -> float | None:
        """Median tokens/s of lone prompts or decodes, over all repeats and seeds."""
        rates = [rate for one in self.of(server, load) for rate in one["seen"]["rates"]]
        return median(rates) if rates else None

    def rows(self) -> list[dict[str, Any]]:
        """One a cell, every figure of it."""
        return [figures(one) for one in self._cells]

    def seeds(self, load: str) -> list[int]:
        """Those any server was measured with."""
        return sorted({one["cell"]["seed"] for one in self._cells if one["cell"]["load"] == load})

    def row(self, server: str, load: str, seed: int) -> dict[str, Any] | None:
        """A cell's figures, if it was measured."""
        return next((figures(one) for one in self.of(server, load) if one["cell"]["seed"] == seed), None)


def figures(one: dict[str, Any]) -> dict[str, Any]:
    """What a cell comes to."""
    seen, short, long = one["seen"], one["seen"]["short_ttft_s"], one["seen"]["long_ttft_s"]
    row: dict[str, Any] = dict(one["cell"])
    row["tokens_per_s"] = median(seen["rates"]) if seen["rates"] else None
    for share in (50, 90, 99):
        row[f"short_ttft_p{share}_s"] = quantile(short, share / 100) if short else None
    row["long_ttft_p50_s"] = quantile(long, 0.5) if long else None
    row["long_ttft_max_s"] = max(long, default=None)
    row["short_tbt_p99_ms"] = 1e3 * quantile(seen["short_gaps_s"], 0.99) if seen["short_gaps_s"] else None
    took_s = seen["took_s"]
    row["total_tokens_per_s"] = (seen["num_prompt_tokens"] + seen["num_output_tokens"]) / took_s if took_s else None
    return row | {key: one[key] for key in ("server_cpu_s", "server_cores", "other_cores", "rate_per_s")}


def head(words: list[str]) -> str:
    """The first two lines of a Markdown table."""
    return line(words) + "\n" + line(["---"] * len(words))


def line(words: list[str]) -> str:
    """One more."""
    return "| " + " | ".join(words) + " |"


def number(value: float | None, num_decimals: int) -> str:
    """Empty where there is none."""
    return "" if value is None else f"{value:,.{num_decimals}f}"
