"""The file of a GPU check: JSON lines, one as soon as a case has ended; readable at any moment. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Case = tuple[str, str]  # part, name


class Results:
    """What is known of each case. Lines: the machine; a fact; or a case with its rows and how it ended."""

    def __init__(self, path: Path, earlier: Sequence[Path], *, is_rehearsal: bool, forgets: Sequence[str]) -> None:
        """earlier: files whose results are gone on with, the first that is there. forgets: parts to measure again.

        What there is of another chip goes aside once the machine is known.
        """
        self._path, self._is_rehearsal = path, is_rehearsal
        self.facts: dict[str, float] = {}
        self.machine: dict[str, Any] | None = None
        self.cases: dict[Case, dict[str, Any]] = {}
        found = next((lines_of(known) for known in earlier if known.exists()), [])
        for line in found:
            if "machine" in line and line.get("is_rehearsal") == is_rehearsal:
                self.machine = line["machine"]
            elif "fact" in line:
                self.facts[line["fact"]] = line["figure"]
            elif "case" in line and line["part"] not in forgets:
                self.cases[line["part"], line["case"]] = line
        if found and self.machine is None:  # of a rehearsal, or of the other kind
            self._put_aside()

    @property
    def done(self) -> list[Case]:
        """Cases that have ended and need no other try."""
        return [case for case, line in self.cases.items() if line["error"] is None]

    def begin(self, machine: Mapping[str, Any]) -> None:
        """Results are of this machine from here on."""
        if self.machine is not None and self.machine.get("chip") != machine.get("chip"):
            self._put_aside()
        self.machine = dict(machine)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, Any]] = [{"machine": self.machine, "is_rehearsal": self._is_rehearsal}]
        lines += [{"fact": name, "figure": figure} for name, figure in self.facts.items()]
        beside = self._path.with_suffix(".part")
        beside.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *self.cases.values()]))
        beside.replace(self._path)

    def take(self, line: dict[str, Any]) -> None:
        """Append what has been found out."""
        if "fact" in line:
            self.facts[line["fact"]] = line["figure"]
        else:
            self.cases[line["part"], line["case"]] = line
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _put_aside(self) -> None:
        self.facts, self.machine, self.cases = {}, None, {}
        if self._path.exists():
            kept = self._path.with_suffix(".earlier.jsonl")
            print(f"--- {self._path} is of another chip or of a rehearsal; it is {kept.name} from now on", flush=True)
            self._path.replace(kept)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one may have been cut off."""
    found: list[dict[str, Any]] = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
