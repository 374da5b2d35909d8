"""A file of requests in OpenAI's batch format, sent to a server; a row of output for every row of input."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import msgspec

from megatron_medha.bench.client import Target, find_model
from megatron_medha.core.errors import ConfigError

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_MAX_WAIT_S = 60.0       # before a request is tried again
# Answers that another try may change: the server is full, shutting down, or has failed.
_RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
# Answers that stay the same whenever the request is sent. Another key, or another server, may change the others.
_FINAL_STATUSES = frozenset({200, 400, 404, 413, 422})


class _InputLine(msgspec.Struct, kw_only=True):
    """A line of input."""

    custom_id: str
    method: str = "POST"
    url: str
    body: dict[str, Any]


class _AnyLine(msgspec.Struct):
    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A request, or why the line holds none."""

    number: int               # of its line, from 1
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None  # what is wrong with the line


@dataclass(slots=True)
class BatchCounts:
    """Rows of output by what became of them."""

    num_kept: int = 0      # they were there before
    num_answered: int = 0
    num_refused: int = 0   # by the server, with a 4xx
    num_failed: int = 0    # without an answer that would stay the same
    num_bad_lines: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether everything that was asked now has its answer."""
        return not (self.num_refused or self.num_failed or self.num_bad_lines)


def read_rows(path: Path) -> Iterator[BatchRow]:
    """Every line that is not blank, in order. A custom_id that came before is a fault."""
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_row(number, line, seen)


def custom_ids(path: Path) -> frozenset[str]:
    """Of all lines that have one."""
    return frozenset(row.custom_id for row in read_rows(path) if row.custom_id is not None)


def num_rows(path: Path) -> int:
    """Lines that are not blank; ConfigError if there is no such file."""
    try:
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError as error:
        raise ConfigError(f"input={path}: {error.strerror}") from None


def keep_completed_rows(path: Path, custom_ids: Callable[[], frozenset[str]]) -> frozenset[str]:
    """Ids that have an answer in the output so far; the file then holds those rows only.

    A line that was being written when we were interrupted goes, and so do rows that another try may change.
    custom_ids: of the input, asked for only if there is output; ConfigError where the output is of another input.
    """
    if not path.exists():
        return frozenset()
    known = custom_ids()
    done: set[str] = set()
    beside = path.with_name(path.name + ".kept")
    with path.open("rb") as before, beside.open("wb") as kept:
        for number, line in enumerate(before, 1):
            try:
                row = json.loads(line)
                custom_id, response, error = row["custom_id"], row["response"], row["error"]
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    beside.unlink()
                    raise ConfigError(f"output={path}: line {number} is no row of a batch's output; "
                        "use another output file") from None
                continue
            if response is None or error is not None or response["status_code"] not in _FINAL_STATUSES:
                continue
            if custom_id not in known:
                beside.unlink()
                raise ConfigError(f"output={path}: line {number} has custom_id `{custom_id}`, which is not in the "
                    "input; use another output file")
            if line.endswith(b"\n"):
                done.add(custom_id)
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    beside.replace(path)
    return frozenset(done)


async def run_rows(
    rows: Iterator[BatchRow],
    done: frozenset[str],
    target: Target,
    out: TextIO,
    note: Callable[[], object],
    *,
    concurrency: int,
    max_attempts: int,
) -> BatchCounts:
    """Send what is not done; a row of output for each, written as its response comes. note: called once for each."""
    counts = BatchCounts(num_kept=len(done))
    todo = (row for row in rows if row.custom_id is None or row.fault is not None or row.custom_id not in done)

    def write(row: BatchRow, response: dict[str, Any] | None, error: dict[str, str] | None) -> None:
        values = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id, "response": response,
                  "error": error}  # fmt: skip
        out.write(json.dumps(values, ensure_ascii=False) + "\n")
        out.flush()
        note()

    async def work(session: aiohttp.ClientSession) -> None:
        for row in todo:
            if row.fault is not None:
                counts.num_bad_lines += 1
                write(row, None, {"code": "invalid_line", "message": f"line {row.number}: {row.fault}"})
                continue
            response, why = await _send(session, target.url, row, max_attempts)
            if response is None:
                counts.num_failed += 1
                write(row, None, {"code": "no_answer", "message": f"line {row.number}: {why}"})
            else:
                status = response["status_code"]
                if status == 200:
                    counts.num_answered += 1
                elif status in _RETRYABLE_STATUSES:
                    counts.num_failed += 1
                else:
                    counts.num_refused += 1
                write(row, response, None)

    async with target.session() as session:
        await find_model(target, session)  # a wrong address or key is reported once, not by every row
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(work(session))
    return counts


def _read_row(number: int, line: bytes, seen: set[str]) -> BatchRow:
    try:
        given = msgspec.json.decode(line, type=_InputLine)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return BatchRow(number, _custom_id_of(line), fault=f"no request: {error}")
    fault = None
    if given.custom_id in seen:
        fault = f"custom_id `{given.custom_id}` is there already"
    elif given.method != "POST":
        fault = f"method `{given.method}`: expected POST"
    elif given.url not in ROUTES:
        fault = f"url `{given.url}`: expected one of {', '.join(ROUTES)}"
    elif given.body.get("stream"):
        fault = "body.stream: a batch has no streams"
    seen.add(given.custom_id)
    return BatchRow(number, given.custom_id, given.url, given.body, fault)


def _custom_id_of(line: bytes) -> str | None:
    """So that a bad line can be found by its id too, where it has one."""
    try:
        return msgspec.json.decode(line, type=_AnyLine).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


async def _send(
    session: aiohttp.ClientSession, url: str, row: BatchRow, max_attempts: int
) -> tuple[dict[str, Any] | None, str]:
    """The answer as OpenAI's batches have it, or None and why there is none."""
    payload = json.dumps(row.body).encode()
    why = ""
    response: dict[str, Any] | None = None
    for attempt in range(max_attempts):
        if attempt:
            await asyncio.sleep(_wait_s(attempt, response))
        response = None
        try:
            async with session.post(
                url + row.url, data=payload, headers={"Content-Type": "application/json"}
            ) as answer:
                text = await answer.text()
                response = {
                    "status_code": answer.status,
                    "request_id": answer.headers.get("x-request-id", ""),
                    "retry_after": answer.headers.get("retry-after"),
                    "body": _as_json(text),
                }
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
        if response is not None and response["status_code"] not in _RETRYABLE_STATUSES:
            break
    if response is not None:
        del response["retry_after"]
    return response, why


def _wait_s(attempt: int, response: dict[str, Any] | None) -> float:
    """As long as the server asks for; without a word 1 s, 2 s, 4 s, ..."""
    asked = response["retry_after"] if response is not None else None
    wait_s = float(asked) if asked is not None and asked.isdigit() else 2.0 ** (attempt - 1)
    return min(wait_s, _MAX_WAIT_S)


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a proxy's page, most often
        return {"error": {"message": text[:1000]}}
