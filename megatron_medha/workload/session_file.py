"""Reads and writes sessions as JSON lines, one turn a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import ConfigError
from megatron_medha.workload.sessions import TurnRow

_MAX_TOKENS = 1 << 40  # of one request; more is a unit mistaken
_SECONDS = ("start_s", "think_s", "tool_s")
_FIRST_TURN = ("start_s", "system_tokens")


def read_session_rows(path: Path, tokens_per_hash_id: int) -> list[TurnRow]:
    """All turns of a .jsonl or .jsonl.gz file. Raises ConfigError naming file, line, value and way out."""
    if not path.is_file():
        raise ConfigError(f"workload.path={path}: no such file; sessions are JSON lines, one turn a line")
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise ConfigError(f"workload.path={path}: sessions are read from .jsonl or .jsonl.gz")
    seen: set[str] = set()
    rows: list[TurnRow] = []
    try:
        for line, text in _lines(path):
            row = _row(f"{path}, line {line}", text, tokens_per_hash_id)
            for name in _FIRST_TURN:
                if row.session in seen and (value := getattr(row, name)):
                    raise ConfigError(f"{path}, line {line}: {name}={value} belongs to the first turn of session "
                        f"{row.session} only; leave it out")
            seen.add(row.session)
            rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"workload.path={path}: cannot be read ({error}); check it or copy it again") from error
    if not rows:
        raise ConfigError(f"workload.path={path}: no turns in it; it needs at least one line")
    return rows


def write_session_rows(path: Path, rows: Iterable[TurnRow]) -> None:
    """The file that read_session_rows() reads. Fields that have their default are left out."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            values = {
                name: value
                for name, value in row._asdict().items()
                if value != TurnRow._field_defaults.get(name, "")
            }
            stream.write(json.dumps(values, separators=(",", ":")) + "\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8-sig") if path.name.endswith(".gz") else path.open(
        encoding="utf-8-sig"
    ) as stream:
        for line, text in enumerate(stream, start=1):
            if text.strip():
                yield line, text


def _row(where: str, text: str, tokens_per_hash_id: int) -> TurnRow:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error}); correct or delete the line") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {text.strip()[:60]} is not an object; one turn a line")
    values = {name: value for name, value in values.items() if value is not None}
    if unknown := sorted(values.keys() - set(TurnRow._fields)):
        raise ConfigError(f"{where}: unknown field {unknown[0]}; the fields are {', '.join(TurnRow._fields)}")
    if missing := [name for name in ("session", "prompt_tokens", "output_tokens") if name not in values]:
        raise ConfigError(f"{where}: {missing[0]} is missing; every turn has session, prompt_tokens and output_tokens")
    for name, value in values.items():
        if why := _why_wrong(name, value):
            raise ConfigError(f"{where}: {name}={str(value)[:60]} {why}; correct or delete the line")
    row = TurnRow(**{**values, "hash_ids": tuple(values.get("hash_ids", ()))})
    if row.parent is not None and row.start_s:
        raise ConfigError(f"{where}: start_s={row.start_s:g}: a subagent begins when its parent's turn has ended; "
            "leave it out, or parent")
    if row.hash_ids and len(row.hash_ids) != (needed := -(-row.prompt_tokens // tokens_per_hash_id)):
        raise ConfigError(f"{where}: {len(row.hash_ids)} hash_ids, but prompt_tokens={row.prompt_tokens} are {needed} "
            f"blocks of {tokens_per_hash_id}; set workload.tokens_per_hash_id to the file's, or correct the line")
    if row.hash_ids and (row.shared_tokens is not None or row.system_tokens):
        raise ConfigError(f"{where}: hash_ids say themselves what is shared; leave shared_tokens and system_tokens out")
    return row


def _why_wrong(name: str, value: Any) -> str:
    """What a field's value must be, if it is not; else nothing."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("session", "parent"):
        return "" if isinstance(value, str) and value else "is not a name"
    if name in _SECONDS:
        return "" if is_number and isfinite(value) and value >= 0.0 else "is not a number of seconds from 0 on"
    if name == "hash_ids":
        is_list = isinstance(value, list) and all(type(one) is int for one in value)
        return "" if is_list else "is not a list of whole numbers"
    least = 1 if name in ("prompt_tokens", "output_tokens") else 0
    is_count = type(value) is int and least <= value <= _MAX_TOKENS
    return "" if is_count else f"is not a whole number from {least} to {_MAX_TOKENS}"
