"""`medha grafana`: the Grafana board for the server's metrics."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from megatron_medha.core.errors import ConfigError

USAGE = """\
usage: medha grafana > medha.json

Prints a Grafana dashboard for the server's metrics. Import it into Grafana and choose the Prometheus data source that
scrapes /metrics.

examples:
  medha grafana > medha.json
"""


def run(words: Sequence[str]) -> int:
    """Print the board."""
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words:
        raise ConfigError(f"{words[0]}: medha grafana takes no options")
    print(board(), end="")
    return 0


def board() -> str:
    """Its JSON: in the package where that was installed from a wheel, else in the working copy."""
    installed = importlib.resources.files("megatron_medha").joinpath("grafana", "medha.json")
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "tools" / "grafana" / "medha.json").read_text(encoding="utf-8")
