"""The arguments in Megatron-LM's common.pt, read without torch: for what the API server must know of a checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import open_regular, read_word
from megatron_medha.safe_files.pickle_machine import (
    Global,
    GlobalResolvers,
    Opaque,
    PickleError,
    SavedNamespace,
    unpickle,
)

_MAX_PICKLE_BYTES = 64 << 20
_TRACKER = "latest_checkpointed_iteration.txt"


def iteration_of(directory: Path) -> Path | None:
    """Where a Megatron checkpoint has its common.pt: that directory, NeMo's weights in it, or the iteration that its
    tracker file names.
    """
    for place in (directory, directory / "weights"):
        if (place / "common.pt").is_file():
            return place
    if not (directory / _TRACKER).is_file():
        return None
    stated = read_word(directory / _TRACKER)
    if stated.isdecimal() and len(stated) < 20:
        stated = f"iter_{int(stated):07d}"
    elif stated != "release":
        return None
    return directory / stated if (directory / stated / "common.pt").is_file() else None


def read_saved_args(iteration: Path) -> Mapping[str, Any]:
    """By name; empty where there are none. Values that are no plain data are Opaque.

    Raises CheckpointError naming the file when it is damaged.
    """
    path = iteration / "common.pt"
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            entry = next((each for each in archive.infolist() if each.filename.endswith("/data.pkl")), None)
            if entry is None or entry.file_size > _MAX_PICKLE_BYTES or entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: holds no pickle as torch.save writes it")
            content = archive.read(entry)
        common = unpickle(content, GlobalResolvers(lambda found: found, _make, Opaque))
    except (PickleError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read, damaged or incomplete: {error}") from error
    args = common.get("args") if isinstance(common, Mapping) else None
    return vars(args) if isinstance(args, SavedNamespace) else {}


def _make(found: Global, args: tuple[Any, ...]) -> Any:
    match (found.module, found.name):
        case ("argparse", "Namespace") | ("types", "SimpleNamespace"):
            return SavedNamespace()
        case ("collections", "OrderedDict" | "defaultdict"):
            return {}
    return Opaque(found)
