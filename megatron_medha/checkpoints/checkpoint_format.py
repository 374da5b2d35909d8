"""What a kind of checkpoint is: how it is recognised and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_medha.models.model_config import ModelConfig

Progress = Callable[[str, float], None]  # what is being done, and which fraction of it is: 0..1


class CheckpointFormat(NamedTuple):
    """One kind. A new one is a file with such a value, and a line in detect.py."""

    looked_for: str  # with the files that make it, for the error when nothing is found
    find: Callable[[Path], Path | None]  # where it is; may raise CheckpointError: it is this kind, and broken
    read_config: Callable[[Path, Path], ModelConfig]  # of the directory that was named, and where it is
    load_weights: Callable[[Any, ModelConfig, Path, Progress], None]  # from where it is
