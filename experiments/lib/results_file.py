"""The cells of an experiment by name, in one JSON file: what has run is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ResultsFile:
    """Cells that have run under the same settings. They are written as they come, so a run that is killed goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self.cells: dict[str, Any] = {}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] != self._settings:
                raise SystemExit(f"{path}: of other settings, {kept['settings']}; name another --out, or remove it")
            self.cells = kept["cells"]

    def cell(self, name: str, run: Callable[[], Any]) -> Any:
        """What run() gives, or gave when it was run first."""
        if name not in self.cells:
            self.keep(name, run())
        return self.cells[name]

    def keep(self, name: str, values: Any) -> None:
        """Write a cell down."""
        self.cells[name] = json.loads(json.dumps(values))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        written = self._path.with_suffix(".tmp")
        written.write_text(json.dumps({"settings": self._settings, "cells": self.cells}, indent=1) + "\n", "utf-8")
        written.replace(self._path)


def verdict(question: str, figure: str, bar: str, is_met: bool) -> bool:
    """Print a figure beside its bar; returns whether it is met."""
    print(f"{question}: {figure}; bar: {bar}: {'met' if is_met else 'missed'}")
    return is_met
