"""What `medha bench` and `medha simulate` have in common: help, --cfg, one run, or -m, a run for every combination."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_medha.cli.parts.arguments import parse_arguments
from megatron_medha.cli.parts.options_help import describe_options
from megatron_medha.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_medha.options.simulate_options import Plots

T = TypeVar("T")


def run_job_command(
    name: str,
    words: Sequence[str],
    usage: str,
    load_class: Callable[[], type[T]],
    job: Callable[[T, str], dict[str, Any]],
) -> int:
    """Do what the words say; the exit code.

    load_class: imports the options' class, which --help does without. job: options and their resolved YAML -> the
    values of summary.json.
    """
    arguments = parse_arguments(words, can_sweep=True)
    if arguments.wants_help:
        print(usage, describe_options(name), sep="\n", end="")
        return 0
    from megatron_medha.options.compose import as_yaml, compose, freeze

    config_class = load_class()
    if arguments.is_multirun:
        from megatron_medha.cli.parts.multirun import multirun

        return multirun(name, config_class, arguments, job)
    composed = compose(name, config_class, arguments.overrides, arguments.config_dir)
    if arguments.shows_config:
        print(as_yaml(composed, arguments.resolves_config), end="")
        return 0
    job(freeze(composed, config_class), as_yaml(composed, resolves=True))
    return 0


def directory_of(out: Path | None, name: str) -> Path:
    """Where a run leaves its results: what the user said, or a directory of its own by date and time."""
    return (out or Path(f"outputs/{name}/{datetime.now():%Y-%m-%d-%H%M%S-%f}")).expanduser()


def check_plots(plots: Plots) -> None:
    """Found out before the run, not after it. Raises ConfigError."""
    from megatron_medha.options.simulate_options import Plots

    if plots is Plots.ALWAYS and not _can_plot():
        raise ConfigError(
            "plots=always: matplotlib is not installed; pip install 'megatron_medha[plots]', or plots=never"
        )


def plot(plots: Plots, directory: Path) -> None:
    """The pictures of a run, where they are wanted."""
    from megatron_medha.options.simulate_options import Plots

    if plots is Plots.NEVER:
        return
    if not _can_plot():
        print("no plots: matplotlib is not installed (pip install 'megatron_medha[plots]')")
        return
    from megatron_medha.cli.reports.plots import plot_run

    plot_run(directory)


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
