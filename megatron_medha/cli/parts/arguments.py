"""What stands behind a subcommand's name: overrides in Hydra's syntax, and the few flags there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """A subcommand's command line."""

    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None
    wants_help: bool = False
    shows_config: bool = False
    resolves_config: bool = False
    is_multirun: bool = False


def parse_arguments(words: Sequence[str], *, can_sweep: bool = False) -> Arguments:
    """Sort the words of a command line. Raises ConfigError for a flag that does not exist.

    can_sweep: the command has -m.
    """
    overrides: list[str] = []
    config_dir: Path | None = None
    shows_config = resolves_config = wants_help = is_multirun = False
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=")
        if word in ("-h", "--help"):
            wants_help = True
        elif word in ("-m", "--multirun"):
            if not can_sweep:
                raise ConfigError(f"{word}: only medha simulate and medha bench run for every combination of values")
            is_multirun = True
        elif word == "--resolve":
            resolves_config = True
        elif flag in ("--cfg", "-c"):
            kind = value if has_value else _value_of(flag, rest)
            if kind != "job":
                raise ConfigError(f"--cfg {kind}: only --cfg job is known; it prints the composed configuration")
            shows_config = True
        elif flag in ("--config-dir", "-cd"):
            config_dir = Path(value if has_value else _value_of(flag, rest)).expanduser()
        elif word.startswith("-"):
            key = _KEYS_OF_FLAGS.get(flag)
            hint = f"write {key}=VALUE" if key else "options are written key=value; --help lists them"
            raise ConfigError(f"{word}: unknown flag; {hint}")
        else:
            overrides.append(word)
    return Arguments(
        overrides=tuple(overrides),
        config_dir=config_dir,
        wants_help=wants_help,
        shows_config=shows_config,
        resolves_config=resolves_config,
        is_multirun=is_multirun,
    )


def _value_of(flag: str, rest: list[str]) -> str:
    if not rest:
        raise ConfigError(f"{flag} needs a value; --help shows it")
    return rest.pop(0)
