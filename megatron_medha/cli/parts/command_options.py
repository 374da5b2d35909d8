"""What commands have in common: their options from the words of the command line, --help, --cfg, and -m."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from megatron_medha.cli.parts.arguments import Arguments, parse_arguments
from megatron_medha.cli.parts.job_words import JobWords
from megatron_medha.cli.parts.options_help import describe_options
from megatron_medha.options.compose import Composed, as_yaml, compose, freeze

T = TypeVar("T")


def read_options(name: str, words: Sequence[str], usage: str, load_class: Callable[[], type[T]]) -> T | None:
    """The options of conf/<name>.yaml with these words; None if help or the configuration was asked for, and printed.

    load_class: imports the options' class, which --help does without.
    """
    arguments = parse_arguments(words, command=name.replace("_", "-"))
    if arguments.wants_help:
        print(usage, describe_options(name, is_short=arguments.help_kind != "all"), sep="\n", end="")
        return None
    config_class = load_class()
    composed = _compose(name, arguments, config_class)
    return None if composed is None else freeze(composed, config_class)


def run_job_command(
    name: str, words: Sequence[str], usage: str, config_class: type[T],
    job: Callable[[T, str, JobWords], dict[str, Any]],
) -> int:  # fmt: skip
    """Run a job once, or with -m for every combination of values; the exit code.

    job: options, their resolved YAML and what was typed -> the values of summary.json.
    """
    arguments = parse_arguments(words, command=name, can_sweep=True)
    if arguments.wants_help:
        print(usage, describe_options(name, is_short=arguments.help_kind != "all"), sep="\n", end="")
        return 0
    if arguments.is_multirun:
        from megatron_medha.cli.parts.multirun import multirun

        return multirun(name, config_class, arguments, job)
    if (composed := _compose(name, arguments, config_class)) is not None:
        job(freeze(composed, config_class), as_yaml(composed, resolves=True), JobWords.of(name, words))
    return 0


def _compose(name: str, arguments: Arguments, config_class: type) -> Composed | None:
    composed = compose(name, config_class, arguments.overrides, arguments.config_dir)
    if not arguments.shows_config:
        return composed
    print(as_yaml(composed, arguments.resolves_config), end="")
    return None


def directory_of(out: Path | None, name: str) -> Path:
    """Where a run leaves its results: what the user said, or a directory of its own by date and time."""
    return (out or Path(f"outputs/{name}/{datetime.now():%Y-%m-%d-%H%M%S-%f}")).expanduser()
