"""Finished runs as a report sees them: their options, results and comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import ConfigError
from megatron_medha.options.renamed_keys import current_values
from megatron_medha.options.yaml_text import flat, yaml_values

# Of no interest when runs are compared.
_IGNORED_KEYS = ("out", "plots", "requests", "objective", "tracking.", "record.")
_SERVER_KEYS = ("scheduler.", "parallel.")


@dataclass(frozen=True, slots=True)
class ReportRun:
    """One finished run."""

    name: str                   # its directory, as short as tells it from the others
    path: Path
    options: Mapping[str, Any]  # by dotted key
    values: Mapping[str, Any]   # summary.json
    is_simulated: bool

    def latency_s(self, length_class: str, name: str, percentile: str) -> float | None:
        """A figure of summary.json; None where the run has no such requests."""
        found: float | None = self.values["classes"].get(length_class, {}).get(name, {}).get(percentile)
        return found

    @property
    def classes(self) -> list[str]:
        """The length classes it has requests of."""
        return list(self.values["classes"])


def find_runs(directories: Sequence[Path]) -> list[ReportRun]:
    """All runs under the directories, in their order, a sweep's by number. Raises ConfigError for a broken one."""
    paths: list[Path] = []
    for directory in directories:
        found = {summary.parent for summary in directory.absolute().rglob("summary.json")}
        paths += sorted(found - set(paths), key=_natural)
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [_read(path, str(path.relative_to(root))) for path in paths]


def is_compared(key: str) -> bool:
    """Whether an option says what ran, not where its results go."""
    return not key.startswith(_IGNORED_KEYS)


def differing_keys(runs: Iterable[ReportRun]) -> list[str]:
    """Options that are not the same in all runs, in the order of their first appearance."""
    values: dict[str, set[str]] = {}
    present: dict[str, int] = {}
    runs = list(runs)
    for run in runs:
        for key, value in run.options.items():
            if is_compared(key):
                values.setdefault(key, set()).add(json.dumps(value))
                present[key] = present.get(key, 0) + 1
    # An option that only some commands have says what kind of run it was, not how it was set.
    return [key for key, found in values.items() if len(found) > 1 and present[key] == len(runs)]


def distinguishing_keys(runs: Sequence[ReportRun]) -> list[str]:
    """The differing keys without those that the ones before settle, as a policy does its own options."""
    told: list[str] = []
    groups: set[tuple[str, ...]] = {()}
    for key in differing_keys(runs):
        finer = {tuple(json.dumps(run.options[name]) for name in [*told, key]) for run in runs}
        if len(finer) > len(groups):
            told, groups = [*told, key], finer
    return told


def _read(path: Path, name: str) -> ReportRun:
    try:
        values = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        options = _options(path / "config.yaml")
        assert isinstance(values["classes"], dict) and isinstance(values["all"], dict)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"{path}: not a run directory of this version ({error!r}); move it away") from None
    # A load's own server says what a simulation is given: the two are compared by it.
    server = _options(path / "server.yaml") if (path / "server.yaml").exists() else {}
    flat = {key: value for key, value in server.items() if key.startswith(_SERVER_KEYS)}
    options = flat | options
    return ReportRun(name, path, _chosen_groups(path, options) | options, values, is_simulated="machine" in values)


def _chosen_groups(path: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """What a job of a sweep chose of groups, as scheduler=lars: people know runs by it, not by what is in it."""
    try:
        words = (path / "overrides.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    chosen = dict(word.split("=", 1) for word in words if "=" in word)
    return {key: value for key, value in chosen.items() if any(one.startswith(f"{key}.") for one in options)}


def _options(path: Path) -> dict[str, Any]:
    return flat(current_values(yaml_values(path.read_text(encoding="utf-8"))))


def _natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """Job 10 after job 9."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts)
