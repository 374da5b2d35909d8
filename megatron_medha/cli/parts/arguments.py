"""What stands behind a subcommand's name: overrides in Hydra's syntax, and the few flags there are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_medha.core.errors import ConfigError

FLAGS = """\
  --help              print this text
  --cfg job           print the composed configuration and exit; with --resolve, ${...} is replaced by its value
  --config-dir DIR    a folder of your own options, laid out like conf/: DIR/scheduler/mine.yaml is scheduler=mine
"""
SWEEP_FLAGS = f"""\
{FLAGS}\
  -m, --multirun      one run for every combination of values separated by commas, each in its own directory below
                      out=DIR; started again with the same DIR, only what is missing runs. hydra/launcher=joblib,
                      submitit_slurm or ray and hydra/sweeper=optuna work if their plugins are installed
"""

# What people type who come from other servers.
_KEYS_OF_FLAGS = {
    "--model": "checkpoint",
    "--model-path": "checkpoint",
    "--tokenizer": "tokenizer",
    "--host": "server.host",
    "--port": "server.port",
    "--api-key": "server.api_key",
    "--served-model-name": "server.served_model_names",
    "--tensor-parallel-size": "parallel.tp",
    "-tp": "parallel.tp",
    "--pipeline-parallel-size": "parallel.spp",
    "-pp": "parallel.spp",
    "--dtype": "model.dtype",
    "--device": "model.device",
    "--block-size": "model.block_size",
    "--max-model-len": "model.max_context_len",
    "--gpu-memory-utilization": "model.kv_memory_share",
    "--max-num-seqs": "scheduler.max_num_sequences",
    "--max-num-batched-tokens": "scheduler.max_batch_tokens",
}


class Arguments(argparse.Namespace):
    """A subcommand's command line."""

    overrides: tuple[str, ...]
    config_dir: Path | None
    wants_help: bool
    shows_config: bool
    resolves_config: bool
    is_multirun: bool
    is_check: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


def parse_arguments(words: Sequence[str], *, can_sweep: bool = False, can_check: bool = False) -> Arguments:
    """Sort the words of a command line. Raises ConfigError for a flag that does not exist.

    can_sweep, can_check: the command has -m, --check.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", dest="wants_help", action="store_true")
    parser.add_argument("-m", "--multirun", dest="is_multirun", action="store_true")
    parser.add_argument("--check", dest="is_check", action="store_true")
    parser.add_argument("--resolve", dest="resolves_config", action="store_true")
    parser.add_argument("--cfg", "-c", dest="kind")
    parser.add_argument("--config-dir", "-cd", type=lambda text: Path(text).expanduser())
    arguments, others = parser.parse_known_args(words, Arguments())
    for word in others:
        if word.startswith("-"):
            key = _KEYS_OF_FLAGS.get(word.partition("=")[0])
            hint = f"write {key}=VALUE" if key else "options are written key=value; --help lists them"
            raise ConfigError(f"{word}: unknown flag; {hint}")
    if arguments.is_multirun and not can_sweep:
        raise ConfigError("--multirun: only medha simulate and medha bench run for every combination of values")
    if arguments.is_check and not can_check:
        raise ConfigError("--check: only medha serve checks a checkpoint")
    if arguments.kind not in (None, "job"):
        raise ConfigError(f"--cfg {arguments.kind}: only --cfg job is known; it prints the composed configuration")
    arguments.shows_config = arguments.kind is not None
    arguments.overrides = tuple(others)
    return arguments
