"""Reading pickles of strangers without running their code: classes off an allow-list become inert placeholders.

Megatron's common.pt and torch's .metadata are pickles. torch.load(weights_only=True) refuses the whole file at the
first class it does not know, and training scripts put classes of their own into the arguments they save; here such a
value is carried along as an Opaque, which matters only to who looks at it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import importlib
import io
import pickle
import types
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch._utils

from megatron_medha.core.errors import CheckpointError


def _tensor_without_attributes(rebuild: Any, _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    """A tensor that somebody's Python attributes were saved with, without them: rebuild is of the list below."""
    return rebuild(*args)


# Constructors of plain data. None of them runs code taken from the file.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytearray"): bytearray,
    ("io", "BytesIO"): io.BytesIO,
    ("pathlib", "PosixPath"): Path,
    ("pathlib._local", "PosixPath"): Path,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_without_attributes,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
}

# Modules whose dataclasses and enums may be made: an index of torch.distributed.checkpoint consists of them.
_MODULES_OF_PLAIN_CLASSES = (
    "torch.distributed._shard.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
)


class Opaque:
    """Stands for an object of a class that is not on the allow-list."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accepts whatever the pickle passes."""

    def __setstate__(self, state: Any) -> None:
        """Accepts whatever the pickle passes."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accepts what a pickled subclass of dict holds."""

    def append(self, value: Any) -> None:
        """Accepts what a pickled subclass of list holds."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, not read>"


class _Unpickler(pickle.Unpickler):
    """pickle.Unpickler over the allow-list."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        if module in _MODULES_OF_PLAIN_CLASSES:
            found = getattr(importlib.import_module(module), name, None)
            if dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, enum.Enum)):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(f"{module}.{name}", (Opaque,), {})


class _StrictUnpickler(_Unpickler):
    """Refuses what is off the allow-list: afterwards the file is known to be harmless to pickle itself."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if isinstance(found, type) and issubclass(found, Opaque):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in it")
        return found


class _PickleModule:
    """What torch.load asks of its pickle_module."""

    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: BinaryIO, **kwargs: Any) -> Any:
        return _Unpickler(file, **kwargs).load()


def load_torch_file(path: Path, is_mapped: bool = False) -> Any:
    """What torch.save wrote to that file, on the CPU. Raises CheckpointError naming the file when it is damaged.

    is_mapped: tensors stay in the file until they are looked at.
    """
    try:
        return torch.load(path, map_location="cpu", pickle_module=_PickleModule, weights_only=False, mmap=is_mapped)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}: cannot be read, damaged or incomplete: {error}") from error


def load_pickle(path: Path) -> Any:
    """What pickle.dump wrote to that file.

    Raises CheckpointError naming the file when it is damaged or holds any class off the allow-list.
    """
    try:
        with path.open("rb") as file:
            return _StrictUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}: cannot be read, damaged or incomplete: {error}") from error
