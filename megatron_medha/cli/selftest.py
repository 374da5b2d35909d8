"""`medha selftest`: fuzz-tests a running server, disconnects in the middle, and counts what came back."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_medha.cli.fuzz import fuzz_cases as cases
from megatron_medha.cli.fuzz.fuzz_cases import LARGE_BODIES, Case
from megatron_medha.cli.fuzz.fuzz_watch import ServerMonitor, ServerObservations
from megatron_medha.cli.fuzz.fuzz_wire import RawClient, RawResponse, ServerMisbehaved, check
from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.options.option_errors import check_http_url
from megatron_medha.stats.text_table import text_table
from megatron_medha.system.descriptors import raise_descriptor_limit

USAGE = """\
usage: medha selftest [key=value ...]

Fuzz-tests a running server: wrong types, huge numbers, deep JSON, broken UTF-8, bytes that are no HTTP, half-closed
sockets, clients that disconnect, requests beyond every limit. The test passes if no response is a 5xx other than 503,
every error has OpenAI's shape, nothing hangs, nothing beyond a limit is accepted and every KV block is free afterwards.
Meanwhile /health is requested every 50 ms: no request may delay the others by more than max_lag_s, or leave more memory
in use than 64 MiB and 8 times a body. Exit code 0: passed.

examples:
  medha selftest
  medha selftest url=http://127.0.0.1:8001 seed=7 num_random=5000
  medha selftest slow_tests=true
  medha selftest shutdown_server=true admin_key=KEY    # tests the drain, which stops the server
"""

_NUM_PARALLEL = 16
_MAX_GROWTH_MIB = 64     # of the server's memory, or 8 times a large body if that is more
_QUIET_S = 30.0          # for requests that were left to leave the engine
_CHECK_PERIOD_S = 0.1
_MAX_SHOWN = 10
_NUM_DRAINED = 4         # streams that run when the server gets the signal to end


class SelftestError(MedhaError):
    """The server cannot be tested; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestConfig:
    """Which server, and how much."""

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    seed: int = 0
    num_random: int = 500
    timeout_s: float = 60.0
    large_mib: int = 16
    max_lag_s: float = 0.05
    slow_tests: bool = False
    shutdown_server: bool = False
    admin_key: str | None = None

    def __post_init__(self) -> None:
        check_http_url("url", self.url)
        if min(self.num_random, self.large_mib) < 1 or min(self.timeout_s, self.max_lag_s) <= 0:
            raise ConfigError("num_random, large_mib, timeout_s and max_lag_s must be above 0")


@dataclass(slots=True)
class CaseGroup:
    """Cases of one kind."""

    name: str
    num_tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was measured


def run(words: Sequence[str]) -> int:
    """Test one server."""
    config = read_options("selftest", words, USAGE, lambda: SelftestConfig)
    if config is None:
        return 0
    groups = asyncio.run(selftest(config))
    print(table(groups))
    return 1 if any(group.failures for group in groups) else 0


async def selftest(config: SelftestConfig) -> list[CaseGroup]:
    """Try everything; after each group the server must be as it was before."""
    wire = RawClient(config.url, config.api_key, config.timeout_s)
    try:
        num_blocks = await _num_free_blocks(wire)
    except OSError as error:
        raise SelftestError(f"{config.url} cannot be reached: {error}") from None
    if num_blocks is None:
        raise SelftestError(f"{config.url} does not show /metrics to this key, or is not ready or not idle")
    kinds = cases.groups(
        wire, random.Random(config.seed), config.num_random, config.large_mib * 2**20, config.slow_tests
    )
    watch = ServerMonitor(wire)
    polling = asyncio.create_task(watch.run())
    before = await watch.look()
    groups, seen = [], []
    for name, of_kind in kinds:
        groups.append(await _try_all(name, of_kind, wire, num_blocks))
        seen.append((name, await watch.look()))
    polling.cancel()
    groups.append(check_side_effects(config, before, seen))
    if config.shutdown_server:
        admin = RawClient(config.url, config.admin_key or config.api_key, config.timeout_s)
        groups.append(await _drained(wire, admin))
    return groups


def table(groups: Sequence[CaseGroup]) -> str:
    """What was tried and what passed, and the first failures in words."""
    rows = [[group.name, str(group.num_tried), str(group.num_tried - len(group.failures))] for group in groups]
    lines = [text_table([["cases", "tried", "passed"], *rows]).rstrip()]
    for group in groups:
        lines += [f"\n{note}" for note in group.notes]
        lines += [f"\n{group.name}: {failure}" for failure in group.failures[:_MAX_SHOWN]]
    return "\n".join(lines)


async def _try_all(name: str, of_kind: Iterable[Case], wire: RawClient, num_blocks: int) -> CaseGroup:
    from tqdm import tqdm

    group = CaseGroup(name)
    # Large bodies go one by one: the limit of memory is that of one.
    limits = asyncio.Semaphore(1 if name == LARGE_BODIES else _NUM_PARALLEL)

    async def attempt(case: Case, bar: tqdm[None]) -> None:
        try:
            await _attempt(case, wire)
        except ServerMisbehaved as error:
            group.failures.append(f"{case.what}: {error}")
        except OSError as error:
            group.failures.append(f"{case.what}: cannot connect: {error}")
        finally:
            limits.release()
            bar.update()

    with tqdm(desc=name, unit="case", file=sys.stderr, leave=False) as bar:
        async with asyncio.TaskGroup() as tasks:
            for case in of_kind:
                await limits.acquire()
                group.num_tried += 1
                tasks.create_task(attempt(case, bar))
    group.num_tried += 1
    for _ in range(int(_QUIET_S / _CHECK_PERIOD_S)):
        if (num_free := await _num_free_blocks(wire)) is not None:
            break
        await asyncio.sleep(_CHECK_PERIOD_S)
    if num_free != num_blocks:
        group.failures.append(f"afterwards {num_free} KV blocks are free, {num_blocks} were free before")
    return group


async def _attempt(case: Case, wire: RawClient) -> None:
    """Broken if the server does what it must not."""
    if case.num_silent:
        raise_descriptor_limit()
    silent = await asyncio.gather(*(wire.connect() for _ in range(case.num_silent)), return_exceptions=True)
    try:
        sender = RawClient(wire.url, wire.api_key, case.timeout_s or wire.timeout_s)
        answer = await sender.send(case.raw, is_half_closed=case.is_half_closed, leaves_after=case.leaves_after)
    finally:
        for connection in silent:
            if not isinstance(connection, BaseException):
                connection[1].transport.abort()
    check(answer)
    status = None if answer is None else answer.status
    if case.statuses is not None and status not in case.statuses:
        raise ServerMisbehaved(
            f"status {status}, expected {case.statuses.start}{' or more' if len(case.statuses) > 1 else ''}"
        )


def check_side_effects(
    config: SelftestConfig, before: ServerObservations, seen: Sequence[tuple[str, ServerObservations]]
) -> CaseGroup:
    """How long others waited and how much memory the server took, against the limits."""
    group = CaseGroup("other clients meanwhile", num_tried=1)
    group.failures += [f"/health during {name}: {failure}" for name, one in seen for failure in one.failures]
    group.notes.append(f"/health was asked {sum(one.num_polls for _, one in seen)} times")
    # Limits are for what one request does; the other cases come many at a time, and wait for each other.
    (name, first), (_, last) = seen[0], seen[-1]
    if first.worst_lag_s is not None:
        group.num_tried += 1
        idle_s = before.worst_lag_s or 0.0
        limit_s = idle_s + config.max_lag_s
        group.notes.append(
            f"event loop: {1e3 * first.worst_lag_s:.0f} ms late at worst in {name} (limit {1e3 * limit_s:.0f}; "
            f"{1e3 * idle_s:.0f} before), {1e3 * max(one.worst_lag_s or 0.0 for _, one in seen):.0f} ms in all"
        )
        if first.worst_lag_s > limit_s:
            group.failures.append(f"during {name} others waited {1e3 * first.worst_lag_s:.0f} ms")
    if before.memory_bytes and first.peak_memory_bytes and last.memory_bytes:
        group.num_tried += 1
        now, after = before.memory_bytes / 2**20, last.memory_bytes / 2**20
        # What the process has had before, while it started, is no matter.
        has_new_peak = first.peak_memory_bytes > (before.peak_memory_bytes or 0.0)
        peak = (first.peak_memory_bytes if has_new_peak else first.most_memory_bytes) / 2**20
        most = max(_MAX_GROWTH_MIB, 8 * config.large_mib)
        group.notes.append(
            f"memory: {now:.0f} MiB before, {peak:.0f} at most in {name} (limit {now + most:.0f}), {after:.0f} now"
        )
        if peak > now + most:
            group.failures.append(f"memory grew by {peak - now:.0f} MiB during {name}, {most} are allowed")
    return group


async def _num_free_blocks(wire: RawClient) -> int | None:
    """Of an idle server; None if it is not idle, or does not say."""
    values = await wire.metrics()
    is_idle = values[b"num_requests_running"] == values[b"num_requests_waiting"] == 0
    return int(values[b"num_free_blocks"]) if is_idle and values[b"num_blocks"] else None


async def _drained(wire: RawClient, admin: RawClient) -> CaseGroup:
    """Drain the server: streams end or get an error, new requests are rejected, and the port closes."""
    group = CaseGroup("drain, the server is gone", num_tried=_NUM_DRAINED + 3)
    stream = wire.request("POST", cases.COMPLETIONS, cases.as_json(cases.LONG_STREAM))
    streams = [asyncio.create_task(wire.send(stream)) for _ in range(_NUM_DRAINED)]
    while not (await wire.metrics())[b"num_requests_running"] and not any(task.done() for task in streams):
        await asyncio.sleep(_CHECK_PERIOD_S)
    told = await admin.ask("POST", "/admin/drain")
    if told is None or told.status != 202:
        status = None if told is None else told.status
        group.failures.append(f"POST /admin/drain: status {status}; give admin_key where the server has one")
    body = cases.as_json(cases.VALID[cases.COMPLETIONS])
    (late,) = await asyncio.gather(wire.ask("POST", cases.COMPLETIONS, body), return_exceptions=True)
    if isinstance(late, RawResponse) and late.status != 503 or isinstance(late, ServerMisbehaved):
        group.failures.append(f"a request after that: {late}")
    for ended in await asyncio.gather(*streams, return_exceptions=True):
        shown = ended.body if isinstance(ended, RawResponse) else b""
        if b"data: [DONE]" not in shown and b'"error"' not in shown:
            group.failures.append(f"a stream was cut off without a word, after {shown[-200:]!r}")
    for _ in range(int(wire.timeout_s / _CHECK_PERIOD_S)):
        try:
            _, writer = await wire.connect()
        except OSError:
            return group
        writer.close()
        await asyncio.sleep(_CHECK_PERIOD_S)
    group.failures.append(f"it still listens after {wire.timeout_s:g} s")
    return group
