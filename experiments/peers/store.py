"""The cells that are done, and what is derived from them once for all servers: the stream's rate, sessions' pauses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from experiments.peers.load import Seen
from experiments.peers.plan import Cell
from experiments.peers.sessions import LonePrefill, mean_think_s


class Store:
    """The cells that are done, a file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, cell: Cell) -> bool:
        """Whether it need not be run again."""
        return self._path(cell).exists()

    def write(self, cell: Cell, seen: Seen, about: dict[str, Any]) -> None:
        """At once and whole: an interrupted run leaves no half of a file."""
        values = {"cell": asdict(cell), **about, "seen": asdict(seen)}
        draft = self._path(cell).with_suffix(".draft")
        draft.write_text(json.dumps(values, indent=1))
        draft.rename(self._path(cell))

    def read_all(self) -> list[dict[str, Any]]:
        """Every cell there is, in order of name."""
        return [json.loads(path.read_text()) for path in sorted(self._directory.glob("*.json"))]

    def rates_of(self, server: str) -> dict[str, float]:
        """Median tokens/s of its lone prompts and decodes so far, by load."""
        found: dict[str, list[float]] = {}
        for one in self.read_all():
            if one["cell"]["server"] == server and one["seen"]["rates"]:
                found.setdefault(one["cell"]["load"], []).extend(one["seen"]["rates"])
        return {load: median(rates) for load, rates in found.items()}

    def rate(self, server: str, long_tokens: tuple[int, int], utilisation: float) -> float:
        """Requests/s that keep that server so busy, by its lone prompts and its decodes in a batch of 8.

        Kept in a file once it is known: every server gets the same stream, whatever is measured later.
        """
        path = self._directory / f"rate-{long_tokens[0]}-{long_tokens[1]}.txt"
        if not path.exists():
            path.write_text(f"{self._rate(server, long_tokens, utilisation):.4g}\n")
        return float(path.read_text())

    def think_s(self, server: str, load: str, utilisation: float) -> float:
        """The mean pause with which the sessions of that load keep that server so busy; kept in a file as well."""
        path = self._directory / f"think-{load}.txt"
        if not path.exists():
            num_sessions, context_len = (int(number) for number in load.split("-")[1:])
            rates = self.rates_of(server)
            seconds = {int(one[8:]): int(one[8:]) / rate for one, rate in rates.items() if "prefill" in one}
            if not seconds or "decode-8" not in rates:
                raise SystemExit(
                    f"the pauses of sessions come from lone prompts and decodes of {server}, which were not measured; "
                    "give --think, or another --rate-from"
                )
            lone = LonePrefill.fitted(seconds)
            think_s = mean_think_s(lone, 1 / rates["decode-8"], num_sessions, context_len, utilisation)
            path.write_text(f"{think_s:.4g}\n")
        return float(path.read_text())

    def _rate(self, server: str, long_tokens: tuple[int, int], utilisation: float) -> float:
        rates = self.rates_of(server)
        seconds = sorted((int(load[8:]), int(load[8:]) / rate) for load, rate in rates.items() if "prefill" in load)
        if not seconds or "decode-8" not in rates:
            raise SystemExit(
                f"the mixed stream's rate comes from lone prompts and decodes of {server}, which were not measured; "
                "give --rate, or another --rate-from"
            )
        short_s = _at(seconds, 160.0) + 40.0 / rates["decode-8"]
        long_s = _at(seconds, sum(long_tokens) / 2) + 24.0 / rates["decode-8"]
        return utilisation / (0.95 * short_s + 0.05 * long_s)

    def _path(self, cell: Cell) -> Path:
        return self._directory / f"{cell.name}.json"


def _at(seconds: list[tuple[int, float]], num_tokens: float) -> float:
    """Straight lines between the lengths that were measured; in proportion beyond them."""
    for (x0, y0), (x1, y1) in zip(seconds, seconds[1:], strict=False):
        if x0 <= num_tokens <= x1:
            return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)
    x, y = seconds[0] if num_tokens < seconds[0][0] else seconds[-1]
    return y * num_tokens / x
