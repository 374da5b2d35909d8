"""Reads request traces: our own columns and four public formats, recognised by their column names. No text."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import NamedTuple, TextIO

from megatron_medha.core.errors import ConfigError

_HASH_IDS = "hash_ids"   # the column of any format
_MAX_TOKENS = 1 << 40  # of one request; more is a unit mistaken, and would only end in "does not fit"


class TraceRow(NamedTuple):
    """One request of a trace."""

    arrival_s: float | None  # None: the trace has lengths only
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()  # of the prompt's blocks; (): the trace has none


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """Names of the columns we read; all others are left alone."""

    name: str
    arrival: str | None
    prompt: str
    output: str
    seconds_per_unit: float | None = 1.0  # of the arrival column; None: date and time
    is_rebased: bool = False              # the first row counts as second 0


# Sources: Azure/AzurePublicDataset (2023, 2024), kvcache-ai/Mooncake (FAST'25 traces, timestamps in ms),
# HPMLL/BurstGPT, microsoft/vidur and project-etalon (lengths only). Ours is first; the first that fits is taken.
FORMATS = (
    TraceFormat("medha", "arrival_s", "prompt_tokens", "output_tokens"),
    TraceFormat("medha, lengths only", None, "prompt_tokens", "output_tokens"),
    TraceFormat("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", None, True),
    TraceFormat("mooncake", "timestamp", "input_length", "output_length", 1e-3, True),
    TraceFormat("burstgpt", "Timestamp", "Request tokens", "Response tokens", 1.0, True),
    TraceFormat("vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    TraceFormat("vidur, lengths only", None, "num_prefill_tokens", "num_decode_tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A trace on disk: .csv or .jsonl, either may be gzipped (.gz)."""

    path: Path
    skips_zero_lengths: bool = False  # True: rows without prompt or output tokens are left out, and counted
    tokens_per_hash_id: int = 512     # of a prompt's block, in traces that have hash_ids

    def rows(self) -> Iterator[TraceRow]:
        """The rows in their order, arrivals never before second 0 and never going back.

        Raises ConfigError naming file, line, value and way out for whatever cannot be a request.
        """
        first_s: float | None = None
        last_s = 0.0
        for line, found, values in self._records():
            arrival_s = self._arrival_s(line, found, values)
            if arrival_s is not None:
                if first_s is None:
                    first_s = arrival_s if found.is_rebased else 0.0
                arrival_s -= first_s
                if not 0.0 <= arrival_s:
                    raise self._error(
                        line, found.arrival, values, "lies before the start of the trace; times count from 0 upwards"
                    )
                if arrival_s < last_s:
                    raise self._error(
                        line, found.arrival, values, "is earlier than the row before it; sort the rows by arrival"
                    )
                last_s = arrival_s
            num_prompt_tokens = self._tokens(line, found.prompt, values)
            num_output_tokens = self._tokens(line, found.output, values)
            if num_prompt_tokens and num_output_tokens:
                hash_ids = self._hash_ids(line, values, num_prompt_tokens)
                yield TraceRow(arrival_s, num_prompt_tokens, num_output_tokens, hash_ids)

    def _records(self) -> Iterator[tuple[int, TraceFormat, dict[str, object]]]:
        """Line number, format and values of every row."""
        if not self.path.is_file():
            what = "is a directory; name one file of it" if self.path.is_dir() else "no such file"
            raise ConfigError(f"workload.path={self.path}: {what}")
        suffix = Path(self.path.name.removesuffix(".gz")).suffix
        if suffix not in (".csv", ".jsonl"):
            raise ConfigError(
                f"workload.path={self.path}: not a kind of file that can be read; use .csv or .jsonl, or .gz of them"
            )
        with self._opened() as stream:
            yield from self._csv(stream) if suffix == ".csv" else self._jsonl(stream)

    @contextmanager
    def _opened(self) -> Iterator[TextIO]:
        try:
            if self.path.name.endswith(".gz"):
                with gzip.open(self.path, "rt", encoding="utf-8-sig", newline="") as stream:
                    yield stream
            else:
                with self.path.open(encoding="utf-8-sig", newline="") as stream:
                    yield stream
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ConfigError(f"workload.path={self.path}: cannot be read ({error}); check or copy it again") from error

    def _csv(self, stream: TextIO) -> Iterator[tuple[int, TraceFormat, dict[str, object]]]:
        reader = csv.reader(stream)
        try:
            header = next(reader, None)
            if header is None:
                raise ConfigError(f"{self.path}: empty; the first line names the columns")
            found = self._format(1, header)
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise ConfigError(
                        f"{self.path}, line {reader.line_num}: {len(values)} values, but the header names "
                        f"{len(header)} columns; complete or delete the row"
                    )
                yield reader.line_num, found, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{self.path}, line {reader.line_num}: {error}; correct or delete the row") from error

    def _jsonl(self, stream: TextIO) -> Iterator[tuple[int, TraceFormat, dict[str, object]]]:
        found: TraceFormat | None = None
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{self.path}, line {line}: not JSON ({error}); correct or delete the line") from None
            if not isinstance(values, dict):
                raise ConfigError(f"{self.path}, line {line}: {text.strip()[:60]} is not an object; one request a line")
            found = found or self._format(line, list(values))
            yield line, found, values

    def _format(self, line: int, columns: list[str]) -> TraceFormat:
        if "session" in columns:
            raise ConfigError(f"{self.path}, line {line}: these are turns of sessions; use workload=sessions")
        for found in FORMATS:
            if {found.prompt, found.output} <= set(columns) and (found.arrival is None or found.arrival in columns):
                return found
        raise ConfigError(
            f"{self.path}, line {line}: columns {', '.join(columns)[:200]} are of no format that is known; name them "
            "arrival_s (may be left out), prompt_tokens, output_tokens, or take an Azure, Mooncake or BurstGPT file"
        )

    def _arrival_s(self, line: int, found: TraceFormat, values: dict[str, object]) -> float | None:
        if found.arrival is None:
            return None
        value = values.get(found.arrival)
        try:
            if found.seconds_per_unit is None:
                at = datetime.fromisoformat(str(value))
                # Not this machine's own zone: an hour of a year would come twice, and the trace would go back.
                return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
            seconds = float(str(value)) * found.seconds_per_unit
        except ValueError:
            wanted = "a date and time" if found.seconds_per_unit is None else "a number"
            raise self._error(line, found.arrival, values, f"is not {wanted}; correct or delete the row") from None
        if not isfinite(seconds):
            raise self._error(line, found.arrival, values, "is not finite; correct or delete the row")
        return seconds

    def _tokens(self, line: int, column: str, values: dict[str, object]) -> int:
        """Of one column; 0 only where such rows are to be skipped."""
        value = values.get(column)
        try:
            number = float(str(value))
        except ValueError:
            raise self._error(line, column, values, "is not a whole number; correct or delete the row") from None
        if not number.is_integer():  # neither is nan or inf
            raise self._error(line, column, values, "is not a whole number; correct or delete the row")
        if number == 0 and self.skips_zero_lengths:
            return 0
        if not 1 <= number <= _MAX_TOKENS:
            zero = "; workload.zero_lengths=skip leaves such rows out" if number == 0 else ""
            raise self._error(line, column, values, f"must be at least 1 and at most {_MAX_TOKENS}{zero}; "
                "correct or delete the row")
        return int(number)

    def _hash_ids(self, line: int, values: dict[str, object], num_prompt_tokens: int) -> tuple[int, ...]:
        """One for each block of the prompt, in order; (): the row has none."""
        value = values.get(_HASH_IDS)
        given = value.split() if isinstance(value, str) else [] if value is None else value
        try:
            ids = tuple([int(str(one)) for one in given]) if isinstance(given, list) else None
        except ValueError:
            ids = None
        if ids is None:
            raise self._error(line, _HASH_IDS, values, "is not a list of whole numbers; correct or delete the row")
        if ids and len(ids) != (needed := -(-num_prompt_tokens // self.tokens_per_hash_id)):
            raise ConfigError(
                f"{self.path}, line {line}: {len(ids)} {_HASH_IDS}, but a prompt of {num_prompt_tokens} tokens has "
                f"{needed} blocks of {self.tokens_per_hash_id}; set workload.tokens_per_hash_id to the trace's"
            )
        return ids

    def _error(self, line: int, column: str | None, values: dict[str, object], what: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {line}: {column}={values.get(column or '')} {what}")
