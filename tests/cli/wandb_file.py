"""Reads back what an offline W&B run wrote; wandb itself has had no reader since 0.31."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7       # ":W&B", a magic number, a version; the same length as a fragment's own header
_BLOCK_BYTES = 32768    # the file is a LevelDB log: fragments that do not cross blocks of this size
_FULL, _FIRST, _LAST = 1, 2, 4


class WandbFile:
    """The records of a run-*.wandb file, sorted by what they are."""

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = {}
        self.name = ""
        self.tags: list[str] = []
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[tuple[str, str, list[str]]] = []  # name, type, paths in it
        self.exit_codes: list[int] = []
        for record in _records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    self.config |= _values(record.run.config.update)
                    self.name, self.tags = record.run.display_name, list(record.run.tags)
                case "config":
                    self.config |= _values(record.config.update)
                case "summary":
                    self.summary |= _values(record.summary.update)
                case "history":
                    self.history.append(_values(record.history.item))
                case "artifact":
                    names = [entry.path for entry in record.artifact.manifest.contents]
                    self.artifacts.append((record.artifact.name, record.artifact.type, names))
                case "exit":
                    self.exit_codes.append(record.exit.exit_code)


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, gathered = _HEADER_BYTES, b""
    while place + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            place += left
            continue
        _, num_bytes, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0 and num_bytes == 0:
            break
        place += _HEADER_BYTES
        gathered = (b"" if kind in (_FULL, _FIRST) else gathered) + data[place : place + num_bytes]
        place += num_bytes
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(gathered)
            yield record
