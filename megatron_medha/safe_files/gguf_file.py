"""The head of a GGUF file: its metadata, and where its tensors lie. Their numbers are read elsewhere.

The `gguf` package reads it too, with numpy and without limits. This one takes files of strangers, and the API server,
which needs the tokenizer in the metadata alone, loads no numpy for it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import open_regular, shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_STRING_BYTES = 8 << 20
_MAX_ARRAY = 4_000_000      # the largest known vocabularies have 300,000 tokens
_MAX_ENTRIES = 100_000      # pieces of metadata; tensors
_MAX_DIMS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}  # of a type, as struct
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in the file."""

    shape: tuple[int, ...]  # as torch has it: the dimension that lies together comes last
    type_id: int            # of ggml: how its numbers are stored
    start: int              # of its bytes in the file


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file says of itself."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    num_bytes: int


def read_gguf(path: Path) -> GGUFFile:
    """The head of that file. Raises CheckpointError if it is damaged, cut off or no GGUF file."""
    with open_regular(path) as file:
        try:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: is no GGUF file: {error}") from error
    with mapping:
        try:
            return _read(path, mapping)
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise CheckpointError(f"{path}: cannot be read as GGUF, damaged or incomplete: {error}") from error


def _read(path: Path, mapping: mmap.mmap) -> GGUFFile:
    head = _Head(path, mapping)
    if (magic := head.take(4)) != _MAGIC:
        raise CheckpointError(f"{path}: begins with {shown(magic)}, not with GGUF: it is no GGUF file")
    version = head.number("I")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path}: GGUF version {version} cannot be read, versions 2 and 3 can")
    num_tensors, num_fields = head.count(_MAX_ENTRIES, "tensors"), head.count(_MAX_ENTRIES, "pieces of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = head.string()
        metadata[key] = head.value(head.number("I"))
    stored = {}
    for _ in range(num_tensors):
        name, num_dims = head.string(), head.number("I")
        if num_dims > _MAX_DIMS:
            raise CheckpointError(f"{path}: tensor {shown(name)} has {num_dims} dimensions; damaged")
        shape = tuple(reversed([head.number("Q") for _ in range(num_dims)]))
        stored[name] = (shape, head.number("I"), head.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment={shown(alignment)} must be a small whole number")
    first = -(-head.at // alignment) * alignment
    tensors = {name: GGUFTensor(shape, type_id, first + offset) for name, (shape, type_id, offset) in stored.items()}
    return GGUFFile(path, metadata, tensors, len(mapping))


class _Head:
    """Reads values one after another."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self._path = path
        self._mapping = mapping
        self.at = 0

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self._mapping) - self.at:
            raise CheckpointError(f"{self._path}: ends in the middle of its metadata; it is cut off or damaged")
        found = self._mapping[self.at : self.at + num_bytes]
        self.at += num_bytes
        return found

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, most: int, what: str) -> int:
        found: int = self.number("Q")
        if found > most:
            raise CheckpointError(f"{self._path}: says that it has {found} {what}, more than {most}; damaged")
        return found

    def string(self) -> str:
        return self.take(self.count(_MAX_STRING_BYTES, "bytes in a text")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _ARRAY:
            inner, size = self.number("I"), self.count(_MAX_ARRAY, "items in a list")
            if inner in _NUMBERS:
                code = _NUMBERS[inner]
                return array(code, self.take(size * struct.calcsize(f"<{code}"))).tolist()
            if inner in (_BOOL, _STRING):
                return [self.value(inner) for _ in range(size)]
            kind = inner
        elif kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        elif kind == _BOOL:
            return self.take(1) != b"\0"
        elif kind == _STRING:
            return self.string()
        raise CheckpointError(f"{self._path}: metadata of the type {kind}, which GGUF does not have; damaged")
