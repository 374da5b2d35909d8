"""The tensors of a torch.distributed.checkpoint directory: its index, .metadata, and their data in *.distcp files.

Read here rather than by torch and Megatron, which unpickle the index with Python's own unpickler.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import open_regular, path_inside
from megatron_medha.safe_files.pickle_machine import PickleError, Record
from megatron_medha.safe_files.safe_pickle import load_pickle, read_archive
from megatron_medha.safe_files.torch_archive import map_file

INDEX_NAME = ".metadata"


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]  # in order of their offsets
    longest: int                     # of the chunks, in the first dimension

    def between(self, start: int, stop: int) -> Iterator[StoredChunk]:
        """The chunks that may have a part of [start, stop) of the first dimension; a stack of layers has thousands."""
        first = bisect_right(self.chunks, start - self.longest, key=lambda chunk: chunk.offsets[0])
        for chunk in self.chunks[first:]:
            if chunk.offsets[0] >= stop:
                return
            yield chunk


def read_index(directory: Path, roots: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors whose names begin with one of the roots, by name; their files are checked to be long enough.

    Raises CheckpointError naming the file at fault.
    """
    path = directory / INDEX_NAME
    metadata = load_pickle(path)
    if not isinstance(metadata, Record) or metadata.name != "Metadata":
        raise CheckpointError(f"{path}: not an index of torch.distributed.checkpoint")
    try:
        places = _places(metadata.fields["storage_data"])
        found = {
            name: _stored_tensor(directory, name, stored, places)
            for name, stored in metadata.fields["state_dict_metadata"].items()
            if isinstance(name, str) and name.startswith(tuple(roots)) and stored.name == "TensorStorageMetadata"
        }
        _check_extent(found)
        return found
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read, damaged or incomplete: {error!r}") from error


def _places(storage_data: dict[Any, Record]) -> dict[str, dict[str, Any]]:
    """Where chunks are stored, by tensor's name and offset in one string: tuples can be chosen to have one hash."""
    return {
        _place_key(index.fields["fqn"], index.fields["offset"]): stored.fields
        for index, stored in storage_data.items()
        if index.fields.get("offset") is not None
    }


def _place_key(name: str, offset: torch.Size) -> str:
    return f"{name} {tuple(offset)}"


def _stored_tensor(directory: Path, name: str, stored: Record, places: dict[str, dict[str, Any]]) -> StoredTensor:
    properties = stored.fields["properties"]
    dtype = properties.state[0] if properties.state else properties.fields["dtype"]
    if not isinstance(dtype, torch.dtype) or not isinstance(stored.fields["size"], torch.Size):
        raise ValueError(f"tensor {name} has no shape or dtype")
    chunks = []
    for chunk in stored.fields["chunks"]:
        offsets, sizes = tuple(chunk.fields["offsets"]), tuple(chunk.fields["sizes"])
        place = places[_place_key(name, chunk.fields["offsets"])]
        start, length = place["offset"], place["length"]
        path = path_inside(directory, place["relative_path"], INDEX_NAME)
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{path}: its tensors were transformed when they were saved; save them plainly")
        if not all(type(number) is int and number >= 0 for number in (start, length, *offsets, *sizes)):
            raise ValueError(f"tensor {name} has a piece in no place")
        if not len(offsets) == len(sizes) == len(stored.fields["size"]):
            raise ValueError(f"tensor {name} has a piece of other dimensions")
        chunks.append(StoredChunk(offsets, sizes, path, start, start + length))
    _check_files(name, chunks)
    chunks.sort(key=lambda chunk: chunk.offsets)
    longest = max((chunk.sizes[0] for chunk in chunks if chunk.sizes), default=0)
    return StoredTensor(tuple(stored.fields["size"]), dtype, tuple(chunks), longest)


def _check_extent(tensors: Mapping[str, StoredTensor]) -> None:
    """Pieces that share bytes, or are larger than their bytes, would make a model larger than the files."""
    paths = {chunk.path for tensor in tensors.values() for chunk in tensor.chunks}
    num_bytes = sum(path.stat().st_size for path in paths)
    num_in_chunks = sum(chunk.stop - chunk.start for tensor in tensors.values() for chunk in tensor.chunks)
    num_in_tensors = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if max(num_in_chunks, num_in_tensors) > num_bytes:
        raise ValueError("its tensors are larger than the files")


def _check_files(name: str, chunks: Sequence[StoredChunk]) -> None:
    sizes: dict[Path, int | None] = {}
    for chunk in chunks:
        if chunk.path not in sizes:
            sizes[chunk.path] = chunk.path.stat().st_size if chunk.path.is_file() else None
        num_bytes = sizes[chunk.path]
        if num_bytes is None or num_bytes < chunk.stop:
            found = "is missing" if num_bytes is None else f"ends after {num_bytes} bytes"
            raise CheckpointError(f"{chunk.path}: {found}, so tensor {name} is incomplete")


@dataclass(slots=True)
class TensorFiles:
    """The data files, each mapped when a piece in it is first asked for."""

    _mappings: dict[Path, mmap.mmap] = field(default_factory=dict)

    def fill(self, target: Tensor, first: Sequence[int], tensor: StoredTensor) -> None:
        """Copy into target the box of the tensor that begins at `first`, as far as the tensor reaches.

        Raises CheckpointError naming the file if a piece is damaged, or the pieces do not cover the box.
        """
        sides = zip(target.shape, tensor.shape, first, strict=True)
        num_expected = torch.Size(max(0, min(size, whole - start)) for size, whole, start in sides).numel()
        num_copied = 0
        for chunk in tensor.between(first[0], first[0] + target.shape[0]):
            begin = [max(a, b) for a, b in zip(first, chunk.offsets, strict=True)]
            end = [
                min(a + n, b + m)
                for a, n, b, m in zip(first, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(b >= e for b, e in zip(begin, end, strict=True)):
                continue
            source = self._read(chunk, tensor.dtype)
            part = target[_box(begin, end, first)]
            part.copy_(source[_box(begin, end, chunk.offsets)])
            num_copied += part.numel()
            _release(self._mappings[chunk.path], chunk)
        if num_copied != num_expected:
            files = sorted({chunk.path.name for chunk in tensor.chunks})
            raise CheckpointError(f"{files}: hold {num_copied} of {num_expected} elements that are needed")

    def _read(self, chunk: StoredChunk, dtype: torch.dtype) -> Tensor:
        try:
            if chunk.path not in self._mappings:
                with open_regular(chunk.path) as file:
                    self._mappings[chunk.path] = map_file(file)
            found = read_archive(self._mappings[chunk.path], chunk.start, chunk.stop)
        except PickleError as error:
            raise CheckpointError(f"{chunk.path}: cannot be read, damaged or incomplete: {error}") from error
        if not isinstance(found, Tensor) or found.shape != chunk.sizes or found.dtype != dtype:
            raise CheckpointError(f"{chunk.path}: holds no {dtype} tensor of {list(chunk.sizes)} at byte {chunk.start}")
        return found


def _release(mapping: mmap.mmap, chunk: StoredChunk) -> None:
    """Give the pages of a chunk back, which would count as the process's memory beside the model's own."""
    start = chunk.start // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, start, chunk.stop - start)


def _box(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, origin, strict=True))
