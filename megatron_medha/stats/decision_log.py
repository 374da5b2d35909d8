"""Every input of the scheduler and every decision, one JSON line each; and the replay that checks them."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    Event,
    FirstStageDone,
    Output,
    RanksLost,
    Woken,
)
from megatron_medha.core.errors import MedhaError
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.ports import SchedulerProtocol
from megatron_medha.core.request import Request
from megatron_medha.stats.log_formats import FORMAT, SentTables, tables_for, take_new_extents, translate_header
from megatron_medha.stats.logged_keys import KeyReader, KeyWriter
from megatron_medha.system.best_effort_file import BestEffortFile, TextSink

_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Arrived, FirstStageDone, Completed, Aborted, RanksLost, Woken)
}

T = TypeVar("T", bound=NamedTuple)


class ReplayError(MedhaError):
    """A replayed decision differs from the recorded one, or the log cannot be read; the message names the line."""


class DecisionLog:
    """An Observer that writes. The first line is the configuration; times are exact, so a replay is too."""

    def __init__(self, stream: TextSink, header: dict[str, Any]) -> None:
        self._stream = stream
        self._keys = KeyWriter()
        self._write({"format": FORMAT, "header": header})

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> DecisionLog:
        """Write to a file, flushed line by line so that a crash loses nothing. Raises OSError."""
        return cls(BestEffortFile.open(path, by_line=True), header)

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        values = _fields(event)
        if isinstance(event, Arrived) and event.request.prefix_keys:
            values["request"]["prefix_keys"] = self._keys.write(event.request.prefix_keys)
        self._write({"now_s": now_s, "event": type(event).__name__, **values})

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self._write({"now_s": now_s, "batch": batch._asdict()})

    def _write(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record, separators=(",", ":"), default=_base64) + "\n")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a log: what happened, or what was decided."""

    line: int
    now_s: float
    entry: Event | Batch
    tables: SentTables | None = None  # of the log, where its chunks name their blocks
    named: Sequence[Sequence[Extent]] = ()  # the blocks that each chunk of this batch names


def read_log(lines: Iterable[str]) -> tuple[dict[str, Any], Iterator[Recorded]]:
    """The header, and the records after it."""
    numbered = enumerate(lines, start=1)
    first = next(numbered, None)
    if first is None:
        raise ReplayError("the decision log is empty")
    opening = _parse(*first)
    header, log_format = opening.get("header"), opening.get("format", 1)  # the first logs name none
    if not isinstance(header, dict):
        raise ReplayError("line 1: not the header of a decision log")
    if not isinstance(log_format, int) or not 1 <= log_format <= FORMAT:
        raise ReplayError(f"line 1: format {log_format} is of a later version; this one reads formats up to {FORMAT}")
    translate_header(header, log_format)
    keys, tables = KeyReader(), tables_for(log_format)
    return header, (_record(line, _parse(line, text), keys, tables) for line, text in numbered)


def replay(records: Iterable[Recorded], decisions: SchedulerProtocol) -> int:
    """Feed the recorded inputs to a scheduler and compare its batches; returns how many were equal.

    Raises ReplayError at the first batch that differs.
    """
    num_batches = 0
    for record in records:
        replay_record(record, decisions)
        num_batches += isinstance(record.entry, Batch)
    return num_batches


def replay_record(record: Recorded, decisions: SchedulerProtocol) -> Sequence[Output]:
    """Feed one record to a scheduler: what comes back for an input, nothing for a batch. Raises ReplayError."""
    if not isinstance(record.entry, Batch):
        if record.tables is not None and isinstance(record.entry, RanksLost):
            record.tables.clear()
        try:
            return decisions.handle(record.entry, record.now_s)
        except KeyError as error:
            raise ReplayError(f"line {record.line}: {record.entry} concerns no batch in flight") from error
    batch = decisions.schedule(record.now_s)
    tables, expected = record.tables, record.entry
    if batch != expected if tables is None or batch is None else not tables.agree(batch, expected, record.named):
        raise ReplayError(f"line {record.line}: recorded {record.entry}, but the replay decides {batch}")
    return ()


def _fields(event: Event) -> dict[str, Any]:
    return event._asdict() if isinstance(event, tuple) else asdict(event)


def _parse(line: int, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReplayError(f"line {line}: {error}") from None
    if not isinstance(record, dict):
        raise ReplayError(f"line {line}: expected an object")
    return record


def _record(line: int, record: dict[str, Any], keys: KeyReader, tables: SentTables | None) -> Recorded:
    try:
        now_s = float(record.pop("now_s"))
        if "batch" in record:
            named = take_new_extents(record["batch"]) if tables is not None else ()
            return Recorded(line, now_s, _named_tuple(Batch, record["batch"]), tables, named)
        kind = _EVENTS[record.pop("event")]
        if kind is Arrived:
            values = record["request"]
            if isinstance(written := values.get("prefix_keys"), list):
                values["prefix_keys"] = keys.read(written)
            return Recorded(line, now_s, Arrived(msgspec.convert(values, Request)), tables)
        entry = _named_tuple(kind, record) if issubclass(kind, tuple) else kind(**record)
        return Recorded(line, now_s, entry, tables)
    except (AttributeError, LookupError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise ReplayError(f"line {line}: not a record of this version ({error!r})") from None


def _named_tuple(kind: type[T], fields: dict[str, Any]) -> T:
    """Of these fields, lists within made tuples again; what an older log lacks has its default."""
    defaults = kind._field_defaults
    values = [fields[name] if name in fields or name not in defaults else defaults[name] for name in kind._fields]
    return msgspec.convert(values, kind)


def _base64(value: object) -> str:
    """Bytes as msgspec reads them back."""
    assert isinstance(value, bytes)
    return b64encode(value).decode()
