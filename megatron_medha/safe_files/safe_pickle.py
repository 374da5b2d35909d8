"""Reads the pickles and torch.save archives of strangers as data: no code of theirs runs, no object of ours changes.

Megatron's common.pt and torch's .metadata are pickles. torch.load(weights_only=True) refuses the whole file at the
first class it does not know, and training scripts put classes of their own into the arguments they save; here such a
value becomes an Opaque, which matters only to code that looks at it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import open_regular, read_bytes
from megatron_medha.safe_files.pickle_machine import (
    Global,
    GlobalResolvers,
    Opaque,
    PickleError,
    Record,
    SavedNamespace,
    unpickle,
)
from megatron_medha.safe_files.torch_archive import MAX_DIMS, TorchArchive, map_file, rebuilt_tensor

__all__ = ["Opaque", "Record", "SavedNamespace", "load_pickle", "load_torch_file", "read_archive", "size_of"]

# The index of a large model's optimizer state has a million entries of 150 bytes, 24 objects each.
_MAX_INDEX_BYTES, _MAX_INDEX_OBJECTS = 192 << 20, 24_000_000

# Modules whose classes may be read: an index of torch.distributed.checkpoint consists of them.
_MODULES_OF_RECORDS = (
    "torch.distributed._shard.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
)


def _namespace(*_: Any) -> SavedNamespace:
    return SavedNamespace()


def _dict(*args: Any) -> dict[Any, Any]:
    if args and not isinstance(args[-1], list | dict):
        return {}  # of a defaultdict, what makes new items
    return {} if not args else _dict_of(args[-1])


def _dict_of(items: Any) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {key: value for key, value in pairs if isinstance(key, str)}


def _list(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], list | tuple) else []


def size_of(sizes: Any = ()) -> torch.Size:
    """A tensor's shape. Raises PickleError for what is none."""
    is_shape = isinstance(sizes, tuple) and len(sizes) <= MAX_DIMS
    if not is_shape or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise PickleError("a shape that is none")
    return torch.Size(sizes)


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise PickleError("an enum's value that is no number")
    return value


def _opaque(*_: Any) -> Opaque:
    return Opaque("a value")


# What makes plain data, by name. None of it is what the name means in Python: see pickle_machine.
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("argparse", "Namespace"): _namespace,
    ("types", "SimpleNamespace"): _namespace,
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): _dict,
    ("builtins", "set"): _list,
    ("builtins", "frozenset"): _list,
    ("builtins", "complex"): _opaque,
    ("builtins", "slice"): _opaque,
    ("builtins", "bytearray"): _opaque,
    ("io", "BytesIO"): _opaque,
    ("pathlib", "PosixPath"): _opaque,
    ("pathlib._local", "PosixPath"): _opaque,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _integer,
    ("torch", "Size"): size_of,
    ("torch", "device"): _opaque,
    ("torch.serialization", "_get_layout"): _opaque,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_tensor"): rebuilt_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuilt_tensor,
}


def _find(found: Global) -> Any:
    """dtypes are values; everything else stays a name."""
    if found.module == "torch" and isinstance(dtype := getattr(torch, found.name, None), torch.dtype):
        return dtype
    return found


def _find_strictly(found: Global) -> Any:
    """Refuses what is off the allow-list."""
    value = _find(found)
    if value is found and _maker(found) is None:
        raise PickleError(f"{found} does not belong in it")
    return value


def _maker(found: Global) -> Callable[..., Any] | None:
    if found.module in _MODULES_OF_RECORDS:
        return lambda *args: Record(found.name, state=args)
    return _MAKERS.get((found.module, found.name))


def _make(found: Global, args: tuple[Any, ...]) -> Any:
    if (found.module, found.name) == ("torch._tensor", "_rebuild_from_type_v2"):
        # A tensor that somebody's Python attributes were saved with, read without them.
        rebuild, _, inner, *_ = args
        return _make(rebuild, inner) if isinstance(rebuild, Global) and isinstance(inner, tuple) else Opaque(rebuild)
    make = _maker(found)
    return Opaque(found) if make is None else make(*args)


def load_torch_file(path: Path) -> Any:
    """What torch.save wrote to that file; tensors stay in the file until they are looked at.

    Raises CheckpointError naming the file when it is damaged, or is anything else than data.
    """
    with open_regular(path) as file:
        try:
            mapping = map_file(file)
            return read_archive(mapping, 0, len(mapping))
        except PickleError as error:
            raise CheckpointError(f"{path}: cannot be read, damaged or incomplete: {error}") from error


def read_archive(mapping: mmap.mmap, start: int, stop: int) -> Any:
    """What torch.save wrote to those bytes of a mapped file. Raises PickleError."""
    archive = TorchArchive(mapping, start, stop)
    return unpickle(archive.pickled(), GlobalResolvers(_find, _make, archive.storage))


def load_pickle(path: Path) -> Any:
    """What pickle.dump wrote to that file.

    Raises CheckpointError naming the file when it is damaged or names anything off the allow-list.
    """
    try:
        return unpickle(read_bytes(path, _MAX_INDEX_BYTES), GlobalResolvers(_find_strictly, _make), _MAX_INDEX_OBJECTS)
    except PickleError as error:
        raise CheckpointError(f"{path}: cannot be read, damaged or incomplete: {error}") from error
