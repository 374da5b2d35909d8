"""What stands behind a subcommand's name: overrides in Hydra's syntax, and the few flags there are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_medha.cli.parts.known_flags import quoted, with_keys
from megatron_medha.cli.parts.model_words import with_sizes
from megatron_medha.core.errors import ConfigError

FLAGS = """\
  --help              print the commonest options; --help=all prints every group, option and key
  --cfg job           print the composed configuration and exit; with --resolve, ${...} is replaced by its value
  --config-dir DIR    a folder of your own options, laid out like conf/: DIR/scheduler/mine.yaml is scheduler=mine
"""
SWEEP_FLAGS = f"""\
{FLAGS}\
  -m, --multirun      one run for every combination of values separated by commas, each in its own directory below
                      out=DIR; started again with the same DIR, only what is missing runs. hydra/launcher=joblib,
                      submitit_slurm or ray and hydra/sweeper=optuna work if their plugins are installed
"""

# The key that a word without "=" is the value of.
BARE_WORDS = {
    "serve": "checkpoint",
    "profile": "checkpoint",
    "check-bits": "checkpoint",
    "train-tiny": "directory",
    "fetch-model": "out",
    "chat": "url",
    "bench": "url",
    "selftest": "url",
}


_COMMANDS_WITH_SIZES = ("serve", "simulate", "plan")  # whose model= is one of conf/model


class Arguments(argparse.Namespace):
    """A subcommand's command line."""

    overrides: tuple[str, ...]
    config_dir: Path | None
    help_kind: str | None  # all, or anything else for the short one
    shows_config: bool
    resolves_config: bool
    is_multirun: bool
    is_check: bool

    @property
    def wants_help(self) -> bool:
        """Whether a help text is asked for instead of a run."""
        return self.help_kind is not None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


def parse_arguments(words: Sequence[str], *, command: str = "", can_sweep: bool = False) -> Arguments:
    """Sort the words of a command line. Raises ConfigError for a flag that does not exist.

    command: whose bare words and flags are read. can_sweep: it has -m.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", dest="help_kind", nargs="?", const="short")
    parser.add_argument("-m", "--multirun", dest="is_multirun", action="store_true")
    parser.add_argument("--check", dest="is_check", action="store_true")
    parser.add_argument("--resolve", dest="resolves_config", action="store_true")
    parser.add_argument("--cfg", "-c", dest="kind")
    parser.add_argument("--config-dir", "-cd", type=lambda text: Path(text).expanduser())
    arguments, others = parser.parse_known_args(words, Arguments())
    if command == "serve":
        others = with_keys(others)
    if command in _COMMANDS_WITH_SIZES and arguments.help_kind is None:
        others = with_sizes(others)
    for word in others:
        if word.startswith("-"):
            raise ConfigError(f"{word}: unknown flag; options are written key=value; --help=all lists them")
    if arguments.is_multirun and not can_sweep:
        raise ConfigError("--multirun: only medha simulate and medha bench run for every combination of values")
    if arguments.is_check and command != "serve":
        raise ConfigError("--check: only medha serve checks a checkpoint")
    if arguments.kind not in (None, "job"):
        raise ConfigError(f"--cfg {arguments.kind}: only --cfg job is known; it prints the composed configuration")
    arguments.shows_config = arguments.kind is not None
    arguments.overrides = tuple(_with_bare_word(others, BARE_WORDS.get(command)))
    return arguments


def _with_bare_word(words: Sequence[str], key: str | None) -> list[str]:
    """A word alone, as in `medha serve DIR`, written as key=value. Raises ConfigError for several of them."""
    is_bare = [key is not None and "=" not in word and not word.startswith(("~", "+")) for word in words]
    given = [word for word, bare in zip(words, is_bare, strict=True) if bare or word.startswith(f"{key}=")]
    if any(is_bare) and len(given) > 1:
        raise ConfigError(f"{' '.join(given)}: several values of {key}; give one")
    return [f"{key}={quoted(word)}" if bare else word for word, bare in zip(words, is_bare, strict=True)]
