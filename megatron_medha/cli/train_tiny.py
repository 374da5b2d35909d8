"""`medha train-tiny`: options for tiny/tiny_training.py. The only command that needs torch in this process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medha.cli.parts.command_options import read_options

USAGE = """\
usage: medha train-tiny [DIR] [key=value ...]

Trains a small byte-level GPT with Megatron-core on the source of Python's standard library, and saves it as a
Megatron torch_dist checkpoint with its tokenizer. Its output is gibberish that looks like Python: it exists so you can
try the server on a real checkpoint.

examples:
  medha train-tiny
  medha train-tiny checkpoints/other seconds=30 seed=1
"""


def run(words: Sequence[str]) -> int:
    """Train and save."""
    options = read_options("train_tiny", words, USAGE, _options_class)
    if options is not None:
        from megatron_medha.tiny.tiny_training import train_tiny

        train_tiny(options.directory.expanduser(), options)
    return 0


def _options_class() -> Any:
    from megatron_medha.system.machine import num_usable_cores
    from megatron_medha.worker.startup.cpu_share import set_passive_omp_wait

    # Beside one busy program, spinning threads made a run of two minutes take more than three.
    set_passive_omp_wait(num_usable_cores())
    # Megatron-core tells of every optional package that is missing; none is needed here.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from megatron_medha.tiny.tiny_training import TrainTinyConfig

    @dataclass(frozen=True, slots=True, kw_only=True)
    class TrainTinyOptions(TrainTinyConfig):
        """Defined here because the module of its base imports torch, and --help should not take seconds."""

        directory: Path

    return TrainTinyOptions
