"""`medha selftest`: throws nonsense at a running server, leaves in the middle, and counts what came back."""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_medha.cli.fuzz import fuzz_cases as cases
from megatron_medha.cli.fuzz.fuzz_watch import ServerMonitor, ServerObservations
from megatron_medha.cli.fuzz.fuzz_wire import OpenResponse, RawClient, ServerMisbehaved, check
from megatron_medha.cli.parts.chat_client import is_http_address
from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.system.descriptors import raise_descriptor_limit

USAGE = """\
usage: medha selftest [key=value ...]

Sends a running server what no client should: wrong types, huge numbers, deep JSON, broken UTF-8, bytes that are no
HTTP, crawling heads, half-closed sockets, clients that leave, more of everything than there are limits for. It holds
if nothing is answered with a 5xx other than 503, every error has OpenAI's shape, nothing hangs, nothing is let through
beyond a limit, and every KV block is free afterwards. Meanwhile /health is asked every 50 ms: no request may keep the
others waiting for more than max_lag_s, or leave more memory in use than 64 MiB and 8 times a body.
Exit code 0: all held.

examples:
  medha selftest
  medha selftest url=http://127.0.0.1:8001 seed=7 num_random=5000
  medha selftest slow_tests=true
  medha selftest shutdown_server=true admin_key=KEY    # at last, whether it drains: then it is gone
"""

LARGE_BODIES = "large bodies"
_NUM_PARALLEL = 16
_MAX_GROWTH_MIB = 64     # of the server's memory, or 8 times a large body if that is more
_QUIET_S = 30.0          # for requests that were left to leave the engine
_CHECK_PERIOD_S = 0.1
_MAX_SHOWN = 10
_SLOW_TIMEOUT_S = 130.0      # for heads (20 s) and bodies (60 s) that never come, by the server's own defaults
_NUM_SILENT = 1_200      # more than the 1,024 descriptors that shells and service managers give
_NUM_DRAINED = 4         # streams that run when the server is told to end
_GUARDED = ("/v1/models", "/metrics", "/version", "/openapi.json", "/debug/schedule", "/tokenize", "/admin/reload")


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
        if not is_http_address(self.url):
            raise ConfigError(f"url={self.url} must look like http://127.0.0.1:8000")
        if min(self.num_random, self.large_mib) < 1 or min(self.timeout_s, self.max_lag_s) <= 0:
            raise ConfigError("num_random, large_mib, timeout_s and max_lag_s must be above 0")


@dataclass(slots=True)
class CaseGroup:
    """Cases of one kind."""

    name: str
    num_tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was measured


Case = tuple[str, Callable[[], Awaitable[None]]]


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
    rng = random.Random(config.seed)
    kinds: list[tuple[str, Iterable[Case]]] = [
        # First, so that the most memory that the server has had is theirs.
        (LARGE_BODIES, (_posted(wire, path, body) for path, body in cases.large_bodies(config.large_mib * 2**20))),
        ("broken JSON", (_posted(wire, path, body) for path, body in cases.broken_bodies())),
        ("wrong fields", (_posted(wire, path, body) for path, body in cases.wrong_fields())),
        ("extreme numbers", (_posted(wire, path, body) for path, body in cases.extreme_numbers())),
        ("beyond the limits", (_refused(wire, path, body) for path, body in cases.beyond_limits())),
        ("hostile grammars", (_posted(wire, path, body) for path, body in cases.hostile_grammars())),
        ("random bodies", (_posted(wire, *case) for case in cases.random_bodies(rng, config.num_random))),
        ("no HTTP", (_sent(wire, raw) for raw in cases.raw_requests(rng))),
        ("HTTP framing", (_framed(wire, *case) for case in cases.framed_requests(config.api_key))),
        ("silent connections", (_beside_silent_connections(wire, num) for num in (100, _NUM_SILENT))),
        ("half-closed sockets", (_half_closed(wire, body) for body, _ in cases.long_streams(rng, 10))),
        ("the same id twice", (_same_id(wire) for _ in range(20))),
        ("clients that leave", (
            _left(wire, body, num_bytes) for body, num_bytes in cases.long_streams(rng, max(1, config.num_random // 10))
        )),
        ("bodies that stop", (_stopped(wire, share / 10) for share in range(10))),
    ]  # fmt: skip
    if config.api_key is not None:
        stranger = RawClient(config.url, None, config.timeout_s)
        kinds.append(("without the key", (_rejected(stranger, path) for path in _GUARDED)))
    if config.slow_tests:
        patient = RawClient(config.url, config.api_key, _SLOW_TIMEOUT_S)
        kinds.append(("crawling heads and bodies", (_slow_sender(patient, has_head) for has_head in (True, False) * 4)))
    watch = await ServerMonitor.start(config.url, config.api_key)
    try:
        before = await watch.look()
        groups, seen = [], []
        for name, of_kind in kinds:
            groups.append(await _try_all(name, of_kind, wire, config, num_blocks))
            seen.append((name, await watch.look()))
    finally:
        await watch.end()
    groups.append(check_side_effects(config, before, seen))
    if config.shutdown_server:
        admin = RawClient(config.url, config.admin_key or config.api_key, config.timeout_s)
        groups.append(await _drained(wire, admin))
    return groups


def table(groups: Sequence[CaseGroup]) -> str:
    """What was tried and what held, and the first failures in words."""
    lines = [f"{'cases':<28}{'tried':>8}{'held':>8}"]
    lines += [f"{group.name:<28}{group.num_tried:>8}{group.num_tried - len(group.failures):>8}" for group in groups]
    for group in groups:
        lines += [f"\n{note}" for note in group.notes]
        lines += [f"\n{group.name}: {failure}" for failure in group.failures[:_MAX_SHOWN]]
    return "\n".join(lines)


async def _try_all(
    name: str, of_kind: Iterable[Case], wire: RawClient, config: SelftestConfig, num_blocks: int
) -> CaseGroup:
    from tqdm import tqdm

    group = CaseGroup(name)
    # Large bodies go one by one: the limit of memory is that of one.
    places = asyncio.Semaphore(1 if name == LARGE_BODIES else _NUM_PARALLEL)

    async def attempt(what: str, work: Callable[[], Awaitable[None]], bar: tqdm[None]) -> None:
        try:
            await work()
        except ServerMisbehaved as error:
            group.failures.append(f"{what}: {error}")
        except OSError as error:
            group.failures.append(f"{what}: cannot connect: {error}")
        finally:
            places.release()
            bar.update()

    with tqdm(desc=name, unit="case", file=sys.stderr, leave=False) as bar:
        async with asyncio.TaskGroup() as tasks:
            for what, work in of_kind:
                await places.acquire()
                group.num_tried += 1
                tasks.create_task(attempt(what, work, bar))
    group.num_tried += 1
    num_free = await _num_free_when_quiet(wire)
    if num_free != num_blocks:
        group.failures.append(f"afterwards {num_free} KV blocks are free, before it were {num_blocks}")
    return group


def check_side_effects(
    config: SelftestConfig, before: ServerObservations, seen: Sequence[tuple[str, ServerObservations]]
) -> CaseGroup:
    """How long others waited and how much memory the server took, against the limits."""
    group = CaseGroup("others meanwhile", num_tried=1)
    group.failures += [f"/health beside {name}: {failure}" for name, one in seen for failure in one.failures]
    during, slowest = max(seen, key=lambda of: of[1].worst_health_s)
    num_polls = sum(one.num_polls for _, one in seen)
    group.notes.append(
        f"/health, asked {num_polls} times: {1e3 * slowest.worst_health_s:.0f} ms at worst, beside {during}"
    )
    # Limits are for what one request does; the other cases come many at a time, and wait for each other.
    (name, first), (_, last) = seen[0], seen[-1]
    if first.worst_lag_s is not None:
        group.num_tried += 1
        idle_s = before.worst_lag_s or 0.0
        worst_s, during = max((one.worst_lag_s or 0.0, of) for of, one in seen)
        limit_s = idle_s + config.max_lag_s
        group.notes.append(
            f"event loop, by the server's own work: {1e3 * first.worst_lag_s:.0f} ms late at worst beside {name} "
            f"(limit {1e3 * limit_s:.0f}: before it were {1e3 * idle_s:.0f}); {1e3 * worst_s:.0f} ms beside {during}"
        )
        if first.worst_lag_s > limit_s:
            group.failures.append(f"beside {name} others waited {1e3 * first.worst_lag_s:.0f} ms")
    if before.memory_bytes and first.peak_memory_bytes and last.memory_bytes:
        group.num_tried += 1
        now, after = before.memory_bytes / 2**20, last.memory_bytes / 2**20
        # What the process has had before, while it started, is no matter.
        has_new_peak = first.peak_memory_bytes > (before.peak_memory_bytes or 0.0)
        peak = (first.peak_memory_bytes if has_new_peak else first.most_memory_bytes) / 2**20
        most = max(_MAX_GROWTH_MIB, 8 * config.large_mib)
        group.notes.append(
            f"memory: {now:.0f} MiB before, {peak:.0f} at most beside {name} (limit {now + most:.0f}); {after:.0f} in "
            f"the end"
        )
        if peak > now + most:
            group.failures.append(f"memory grew by {peak - now:.0f} MiB beside {name}, {most} are allowed for these")
    return group


async def _num_free_when_quiet(wire: RawClient) -> int | None:
    """Free blocks once no request is live; as they are when that does not come."""
    num_free = None
    for _ in range(int(_QUIET_S / _CHECK_PERIOD_S)):
        num_free = await _num_free_blocks(wire)
        if num_free is not None:
            return num_free
        await asyncio.sleep(_CHECK_PERIOD_S)
    return num_free


async def _num_free_blocks(wire: RawClient) -> int | None:
    answer = await wire.ask("GET", "/metrics")
    if answer is None or answer.status != 200:
        return None
    values: dict[bytes, float] = defaultdict(float)  # over all replicas
    for name, value in re.findall(rb"^medha:(\w+)\{[^}]*\} ([\d.e+]+)$", answer.body, re.MULTILINE):
        values[name] += float(value)
    is_idle = values[b"num_requests_running"] == values[b"num_requests_waiting"] == 0
    return int(values[b"num_free_blocks"]) if is_idle and values[b"num_blocks"] else None


def _posted(wire: RawClient, path: str, body: bytes, headers: dict[str, str] | None = None) -> Case:
    async def work() -> None:
        check(await wire.ask("POST", path, body, headers))

    return f"POST {path} {body[:120]!r}{f' {headers}' if headers else ''}", work


def _refused(wire: RawClient, path: str, body: bytes) -> Case:
    async def work() -> None:
        answer = await wire.ask("POST", path, body)
        check(answer)
        if answer is None or answer.status < 400:
            raise ServerMisbehaved(f"status {answer.status if answer else None}, though it is beyond any limit")

    return f"POST {path} {body[:120]!r}", work


async def _drained(wire: RawClient, admin: RawClient) -> CaseGroup:
    """Tell the server to end: what runs must end well or be told, what is new refused, and then nobody listens."""
    group = CaseGroup("drain, the server is gone")
    raw = wire.request("POST", cases.COMPLETIONS, cases.as_json(cases.LONG_STREAM))
    try:
        streams = [await wire.begin(raw) for _ in range(_NUM_DRAINED)]
    except (ServerMisbehaved, OSError) as error:
        return CaseGroup(group.name, 1, [f"{_NUM_DRAINED} streams before it: {error}"])
    tries: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("POST /admin/drain", lambda: _start_drain(admin)),
        ("a request after that", lambda: _is_rejected_while_draining(wire)),
        *((f"stream {place}", partial(_ends_well, stream)) for place, stream in enumerate(streams)),
        ("the end of the server", lambda: _is_gone(wire)),
    ]
    for what, work in tries:
        group.num_tried += 1
        try:
            await work()
        except ServerMisbehaved as error:
            group.failures.append(f"{what}: {error}")
            if group.num_tried == 1:
                break  # it has not been told, so nothing else can be expected of it
    for stream in streams:
        stream.close()
    return group


async def _start_drain(admin: RawClient) -> None:
    answer = await admin.ask("POST", "/admin/drain")
    if answer is None or answer.status != 202:
        raise ServerMisbehaved(
            f"status {answer.status if answer else None}; it needs admin_key where the server has one"
        )


async def _is_rejected_while_draining(wire: RawClient) -> None:
    try:
        answer = await wire.ask("POST", cases.COMPLETIONS, cases.as_json(cases.VALID[cases.COMPLETIONS]))
    except OSError:
        return  # it has ended already
    check(answer)
    if answer is not None and answer.status != 503:
        raise ServerMisbehaved(f"status {answer.status}, though the server is shutting down")


async def _ends_well(stream: OpenResponse) -> None:
    answer = await stream.rest()
    if b"data: [DONE]" not in answer and b'"error"' not in answer:
        raise ServerMisbehaved(f"it was cut off without a word, after {answer[-200:]!r}")


async def _is_gone(wire: RawClient) -> None:
    for _ in range(int(wire.timeout_s / _CHECK_PERIOD_S)):
        try:
            _, writer = await wire.connect()
        except OSError:
            return
        writer.close()
        await asyncio.sleep(_CHECK_PERIOD_S)
    raise ServerMisbehaved(f"it still listens after {wire.timeout_s:g} s")


def _sent(wire: RawClient, raw: bytes) -> Case:
    async def work() -> None:
        # Some of these are requests that only lack their end; saying that no more comes is their end.
        check(await wire.send(raw, is_half_closed=True))

    return repr(raw[:120]), work


def _framed(wire: RawClient, raw: bytes, statuses: tuple[int, ...]) -> Case:
    async def work() -> None:
        begun = await wire.begin(raw)
        found = tuple(int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", await begun.rest()))
        begun.close()
        if found != statuses:
            raise ServerMisbehaved(f"statuses {found} instead of {statuses}")

    return repr(raw[:200]), work


def _beside_silent_connections(wire: RawClient, num_connections: int) -> Case:
    async def work() -> None:
        raise_descriptor_limit()
        silent = await asyncio.gather(*(wire.connect() for _ in range(num_connections)), return_exceptions=True)
        try:
            answer = await wire.ask("GET", "/health")
        finally:
            for connection in silent:
                if not isinstance(connection, BaseException):
                    connection[1].transport.abort()
        if answer is None or answer.status != 200:
            raise ServerMisbehaved(f"/health: status {answer.status if answer else None}")

    return f"{num_connections} connections that send nothing", work


def _half_closed(wire: RawClient, body: bytes) -> Case:
    async def work() -> None:
        # Answered or closed, both are right: the end of sending is all that a client that leaves says, too.
        check(await wire.send(wire.request("POST", cases.COMPLETIONS, body), is_half_closed=True))

    return f"half-closed {body[:80]!r}", work


def _same_id(wire: RawClient) -> Case:
    async def work() -> None:
        body = cases.as_json(cases.VALID[cases.COMPLETIONS])
        answers = await asyncio.gather(
            *(wire.ask("POST", cases.COMPLETIONS, body, {"x-request-id": "the-same"}) for _ in range(2))
        )
        for answer in answers:
            check(answer)

    return "two requests of one id", work


def _left(wire: RawClient, body: bytes, num_bytes: int) -> Case:
    async def work() -> None:
        await wire.leave(wire.request("POST", cases.COMPLETIONS, body), num_bytes)

    return f"left after {num_bytes} bytes of {body[:80]!r}", work


def _stopped(wire: RawClient, share: float) -> Case:
    async def work() -> None:
        raw = wire.request("POST", cases.COMPLETIONS, cases.as_json(cases.VALID[cases.COMPLETIONS]))
        await wire.leave(raw[: int(share * len(raw))], 0)

    return f"gone after {share:.0%} of a request", work


def _rejected(stranger: RawClient, path: str) -> Case:
    async def work() -> None:
        answer = await stranger.ask("GET", path)
        if answer is None or answer.status != 401:
            raise ServerMisbehaved(f"status {answer.status if answer else None} without a key")
        check(answer)

    return f"GET {path} without a key", work


def _slow_sender(wire: RawClient, has_head: bool) -> Case:
    async def work() -> None:
        raw = wire.request("POST", cases.COMPLETIONS, b"x" * 100)
        check(await wire.send(raw[:-50] if has_head else raw[:30]))

    return f"a {'body' if has_head else 'head'} that never ends", work
