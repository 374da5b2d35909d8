"""`medha run-batch`: answers a file of requests, by a server that runs or by one of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_medha.bench.batch_file import custom_ids, keep_completed_rows, num_rows, read_rows, run_rows
from megatron_medha.bench.client import Target
from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.cli.parts.served import server_process
from megatron_medha.core.errors import ConfigError, check_range
from megatron_medha.options.option_errors import check_http_url
from megatron_medha.system.checked_files import check_writable
from megatron_medha.system.scratch import scratch_directory

USAGE = """\
usage: medha run-batch INPUT OUTPUT [key=value ...] [-- key=value ...]

Sends every request of a file to a server and writes the responses into another file. Both have the format of OpenAI's
batches: lines with custom_id, method, url and body; lines with custom_id and response or error. Run again after an
interruption, it sends what is missing. A line that is no request gets an error row. Exit code 0: every response has
status 200; 1: some have not, see their rows.

examples:
  medha run-batch requests.jsonl answers.jsonl
  medha run-batch requests.jsonl answers.jsonl url=http://gpu-7:8000 concurrency=256
  medha run-batch requests.jsonl answers.jsonl checkpoint=DIR -- model.kv_memory_gib=8

Words after -- are options of medha serve, for the server that checkpoint=DIR starts.
"""

@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """Everything a user can say, as conf/run_batch.yaml lays it out."""

    input: Path
    output: Path
    url: str = "http://127.0.0.1:8000"
    checkpoint: Path | None = None
    serve: tuple[str, ...] = ()
    api_key: str | None = None
    slo_class: str | None = "batch"
    concurrency: int = 64
    max_attempts: int = 8
    request_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_http_url("url", self.url)
        for key, low, high in (("concurrency", 1, 10_000), ("max_attempts", 1, 1000), ("request_timeout_s", 0.1, 1e6)):
            check_range(key, getattr(self, key), low, high)
        if self.input == self.output:
            raise ConfigError(f"output={self.output}: is the input too; take another file")
        if self.serve and self.checkpoint is None:
            raise ConfigError(f"serve={list(self.serve)}: needs checkpoint=DIR; a server that runs is not changed")


def run(words: Sequence[str]) -> int:
    """Answer one file."""
    options = read_options("run_batch", with_file_keys(words), USAGE, lambda: BatchOptions)
    return 0 if options is None else run_batch(options)


def with_file_keys(words: Sequence[str]) -> list[str]:
    """The words, the first two that are no options being the files, and those after -- the server's."""
    keys = iter(("input", "output"))
    named = []
    place = words.index("--") if "--" in words else len(words)
    for word in words[:place]:
        is_file = not word.startswith("-") and "=" not in word
        key = next(keys, None) if is_file else None
        # Quoted: names of files may hold what has a meaning in options.
        named.append(f"{key}={_quoted(word)}" if key is not None else word)
    if words[place + 1 :]:
        named.append(f"serve=[{','.join(map(_quoted, words[place + 1 :]))}]")
    return named


def _quoted(word: str) -> str:
    escaped = word.replace("'", "\\'")
    return f"'{escaped}'"


def run_batch(options: BatchOptions) -> int:
    """One batch with its output; 0 if every line has been answered."""
    num_lines = num_rows(options.input)
    check_writable("output", options.output)
    done = keep_completed_rows(options.output, lambda: custom_ids(options.input))
    if len(done) == num_lines:
        print(f"{num_lines:,} rows: all completed; {options.output}")
        return 0
    with _server(options) as url:
        target = Target(
            url=url.rstrip("/").removesuffix("/v1"),
            api_key=options.api_key,
            request_timeout_s=options.request_timeout_s,
            headers={} if options.slo_class is None else {"x-slo-class": options.slo_class},
        )
        with (
            options.output.open("a", encoding="utf-8") as out,
            tqdm(total=num_lines, initial=len(done), unit="row", file=sys.stderr, dynamic_ncols=True) as bar,
        ):
            try:
                counts = asyncio.run(
                    run_rows(
                        read_rows(options.input), done, target, out, bar.update,
                        concurrency=min(options.concurrency, max(1, num_lines)), max_attempts=options.max_attempts,
                    )
                )  # fmt: skip
            except KeyboardInterrupt:
                bar.close()
                print("interrupted; run the same command to resume", file=sys.stderr)
                raise
    kept = f"{counts.num_kept:,} were there, " if counts.num_kept else ""
    print(
        f"{num_lines:,} rows: {kept}{counts.num_answered:,} answered, {counts.num_refused:,} refused, "
        f"{counts.num_failed:,} failed, {counts.num_bad_lines:,} bad lines; {options.output}"
    )
    return 0 if counts.is_clean else 1


@contextmanager
def _server(options: BatchOptions) -> Iterator[str]:
    """The address of a server: the one that runs, or one of our own for as long as it is needed."""
    if options.checkpoint is None:
        yield options.url
        return
    with scratch_directory() as directory:
        print(f"starting medha serve checkpoint={options.checkpoint}", file=sys.stderr)
        checkpoint = f"checkpoint={_quoted(str(options.checkpoint))}"
        with server_process([checkpoint, *options.serve], directory / "server.log") as url:
            yield url
