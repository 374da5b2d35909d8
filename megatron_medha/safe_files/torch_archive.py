"""The zip archives that torch.save writes, in a mapped file: where their entries lie, and tensors over them.

Entries are stored uncompressed, so a tensor is a view of the file. What else torch.load reads is refused: TorchScript
(a program), compressed entries (a small file could fill the memory) and the format before PyTorch 1.6.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_medha.safe_files.pickle_machine import Global, PickleError

_MAX_ENTRIES = 200_000  # one per tensor
_MAX_PICKLE_BYTES = 16 << 20
MAX_DIMS = 16
# The zip format: end record, its 64-bit locator and variant, a file's header in the directory, and before its data.
_END = struct.Struct("<4s6xHLLH")
_LOCATOR_64 = struct.Struct("<4s4xQ4x")
_END_64 = struct.Struct("<4s28xQQQ")
_CENTRAL = struct.Struct("<4s6xH8xLLHHH8xL")
_LOCAL = struct.Struct("<4s22xHH")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF  # the value is in the 64-bit variant

_DTYPE_OF_STORAGE = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """The bytes of an archived file, within the mapping."""

    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Storage:
    """The elements behind one or more tensors."""

    mapping: mmap.mmap
    start: int
    dtype: torch.dtype
    numel: int


def map_file(file: BinaryIO) -> mmap.mmap:
    """The file's bytes, read from the disk when they are looked at. Raises PickleError when it has none."""
    try:
        # Copied on write: torch complains of memory that it may not write to.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise PickleError(str(error)) from error


class TorchArchive:
    """One archive, which takes up bytes [start, stop) of a mapped file. Raises PickleError for what is none."""

    def __init__(self, mapping: mmap.mmap, start: int, stop: int) -> None:
        self._mapping = mapping
        self._entries = _entries(mapping, start, stop)
        if any(name in self._entries for name in ("constants.pkl", "model.json")):
            raise PickleError("it is a TorchScript archive, which is a program; save a state_dict with torch.save")
        if (order := self._entries.get("byteorder")) is not None and self._bytes(order, 16) != b"little":
            raise PickleError("it was written on a big-endian machine")

    def pickled(self) -> bytes:
        """The pickle that describes what was saved."""
        entry = self._entries.get("data.pkl")
        if entry is None:
            raise PickleError("it holds no data.pkl, as what torch.save writes does")
        return self._bytes(entry, _MAX_PICKLE_BYTES)

    def storage(self, persistent_id: Any) -> Storage:
        """The elements that a persistent id of the pickle stands for."""
        match persistent_id:
            case ("storage", Global(name=kind), str(key), _, int(numel), *_) if kind in _DTYPE_OF_STORAGE:
                dtype, entry = _DTYPE_OF_STORAGE[kind], self._entries.get(f"data/{key}")
            case _:
                raise PickleError("a storage of no known kind")
        if entry is None or not 0 <= numel * dtype.itemsize <= entry.num_bytes:
            raise PickleError(f"storage {key[:40]} is missing or shorter than it should be")
        return Storage(self._mapping, entry.start, dtype, numel)

    def _bytes(self, entry: ArchiveEntry, max_bytes: int) -> bytes:
        if entry.num_bytes > max_bytes:
            raise PickleError(f"its description takes {entry.num_bytes} bytes; at most {max_bytes} are read")
        return self._mapping[entry.start : entry.start + entry.num_bytes]


def rebuilt_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of the storage. Raises PickleError if any of it lies outside, or it has more elements than that."""
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleError("a tensor of no known kind")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DIMS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise PickleError("a tensor whose shape is none")
    numel = 1
    for length in size:
        numel *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # With a stride of 0 a few bytes could stand for any number of elements, which a copy would write out.
    if numel > storage.numel or (numel and last >= storage.numel):
        raise PickleError(f"a tensor of {numel} elements is larger than its storage of {storage.numel}")
    if not numel:
        return torch.empty(size, dtype=storage.dtype)
    elements = torch.frombuffer(storage.mapping, dtype=storage.dtype, count=storage.numel, offset=storage.start)
    return elements.as_strided(size, stride, offset)


def _entries(mapping: mmap.mmap, start: int, stop: int) -> dict[str, ArchiveEntry]:
    """The archive's files by their name below its top folder."""
    try:
        num_entries, at = _directory(mapping, start, stop)
        found: dict[str, ArchiveEntry] = {}
        for _ in range(num_entries):
            name, entry, at = _entry(mapping, start, stop, at)
            if name in found:
                raise PickleError(f"holds {name[:80]} twice")
            found[name] = entry
    except (struct.error, ValueError) as error:
        raise PickleError(f"no zip archive, as torch.save writes since PyTorch 1.6 ({error})") from error
    return found


def _directory(mapping: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """How many entries there are, and where in the mapping the first one's header is."""
    at = stop - _END.size
    if not 0 <= start <= at or stop > len(mapping):
        raise PickleError("it is cut short")
    magic, num_entries, size, offset, _ = _END.unpack_from(mapping, at)
    if magic != b"PK\x05\x06":
        raise PickleError("no zip archive, as torch.save writes since PyTorch 1.6, or cut short")
    if _FULL_32 in (size, offset) or num_entries == _FULL_16:
        magic, end = _LOCATOR_64.unpack_from(mapping, max(start, at - _LOCATOR_64.size))
        if magic != b"PK\x06\x07" or not 0 <= end <= stop - start - _END_64.size:
            raise PickleError("its directory is damaged")
        magic, num_entries, size, offset = _END_64.unpack_from(mapping, start + end)
    if num_entries > _MAX_ENTRIES or offset + size > stop - start:
        raise PickleError(f"its directory is damaged or has more than {_MAX_ENTRIES} entries")
    return num_entries, start + offset


def _entry(mapping: mmap.mmap, start: int, stop: int, at: int) -> tuple[str, ArchiveEntry, int]:
    """The entry whose header in the directory is there, its name, and where the next header is."""
    magic, method, num_stored, num_bytes, name_len, extra_len, comment_len, local = _CENTRAL.unpack_from(mapping, at)
    if magic != b"PK\x01\x02":
        raise PickleError("its directory is damaged")
    name_at = at + _CENTRAL.size
    name = mapping[name_at : name_at + name_len].decode(errors="replace").partition("/")[2]
    extra = mapping[name_at + name_len : name_at + name_len + extra_len]
    num_bytes, num_stored, local = _with_64_bits(extra, num_bytes, num_stored, local)
    if method or num_stored != num_bytes:
        raise PickleError(f"{name[:80]} is compressed, which torch.save never does")
    magic, local_name_len, local_extra_len = _LOCAL.unpack_from(mapping, min(start + local, stop))
    first = start + local + _LOCAL.size + local_name_len + local_extra_len
    if magic != b"PK\x03\x04" or first + num_bytes > stop:
        raise PickleError(f"{name[:80]} is damaged or cut short")
    return name, ArchiveEntry(first, num_bytes), name_at + name_len + extra_len + comment_len


def _with_64_bits(extra: bytes, *numbers: int) -> list[int]:
    """Those numbers, with the full ones replaced by what the extra field of type 1 says, in its order."""
    place, wide = 0, b""
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            wide = extra[place + 4 : place + 4 + size]
        place += 4 + size
    given = iter([value for (value,) in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8])])
    return [next(given, number) if number == _FULL_32 else number for number in numbers]
