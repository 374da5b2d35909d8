"""`medha selftest` against servers that hold and servers that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from megatron_medha.cli.fuzz import fuzz_cases as cases
from megatron_medha.cli.fuzz.fuzz_watch import ServerObservations
from megatron_medha.cli.fuzz.fuzz_wire import ServerMisbehaved, check, parse
from megatron_medha.cli.medha import main
from megatron_medha.cli.selftest import SelftestConfig, check_side_effects, selftest, table

Words = tuple[str, ...]
Start = Callable[..., Any]  # conftest.Medha


@pytest.fixture
def few_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of cases take half a minute."""
    monkeypatch.setattr(cases, "FIELDS", ("n", "prompt", "stop"))


def test_a_server_of_ours_holds_shows_nothing_without_its_key_and_drains(
    start: Start, simulated: Words, few_fields: None, capsys: pytest.CaptureFixture[str]
) -> None:
    medha = start(*simulated, "server.admin_key=sk-root", "server.api_key=sk-user", "log_level=warning")
    url = medha.url()
    medha.line_with("ready after")
    keys = ["api_key=sk-user", "admin_key=sk-root"]
    # Whether it is quick is no test of what it does: other tests run beside it.
    limits = ["max_lag_s=60", "large_mib=1"]
    code = main(["selftest", f"url={url}", "num_random=60", "shutdown_server=true", *limits, *keys])
    out = capsys.readouterr().out
    assert code == 0, out
    assert all(name in out for name in ("beyond the limits", "without the key", "drain")) and "afterwards" not in out
    assert medha.end() == 0  # as asked
    assert medha.errors.read_text() == ""  # nothing that was sent is an error of ours


def test_a_server_that_is_not_there_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "url=http://127.0.0.1:9"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["selftest", "url=127.0.0.1"]) == 2


METRICS = (
    "medha:num_requests_running{{}} 0.0\nmedha:num_requests_waiting{{}} 0.0\n"
    "medha:num_blocks{{}} 9.0\nmedha:num_free_blocks{{}} {num_free}\n"
)


async def broken_server(answer: bytes, free_blocks: list[int]) -> tuple[asyncio.Server, int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.read(65536)
        body = METRICS.format(num_free=float(free_blocks.pop(0) if len(free_blocks) > 1 else free_blocks[0])).encode()
        is_scrape = head.startswith(b"GET /metrics")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body if is_scrape else answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "free_blocks", "what"),
    [
        (b"HTTP/1.1 500 Oops\r\n\r\nTraceback", [9], "status 500"),
        (b"HTTP/1.1 400 Bad\r\ncontent-type: application/json\r\n\r\n{}", [9], "OpenAI's shape"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", [9], "without Retry-After"),
        (b"what?", [9], "not an HTTP response"),
        (b"HTTP/1.1 200 OK\r\n\r\n", [9], "status 200, expected 400 or more"),
        (b"HTTP/1.1 200 OK\r\n\r\n", [9, 8], "afterwards 8 KV blocks are free, 9 were free before"),
    ],
)
def test_what_a_server_does_wrong_is_found(
    answer: bytes, free_blocks: list[int], what: str, few_fields: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "PATHS", (cases.COMPLETIONS,))
    monkeypatch.setattr(cases, "wrong_fields", lambda: iter(()))

    async def work() -> str:
        server, port = await broken_server(answer, free_blocks)
        async with server:
            url = f"http://127.0.0.1:{port}"
            return table(await selftest(SelftestConfig(url=url, num_random=1, large_mib=1, timeout_s=5.0)))

    assert what in asyncio.run(work())


def test_an_answer_in_chunks_is_put_together() -> None:
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert parse(raw).body == b"abcde"
    check(None)
    with pytest.raises(ServerMisbehaved, match="without its size"):
        parse(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n")


def seen(
    lag_ms: float | None, memory_mib: float = 100.0, peak_mib: float = 100.0, failures: Words = ()
) -> ServerObservations:
    lag_s = None if lag_ms is None else lag_ms / 1e3
    return ServerObservations(9, lag_s, memory_mib * 2**20, memory_mib * 2**20, peak_mib * 2**20, list(failures))


@pytest.mark.parametrize(("before", "during", "what"), [
    (seen(5), seen(54), ""), (seen(5), seen(56), "others waited 56 ms"), (seen(40), seen(85), ""),
    (seen(5), seen(5, peak_mib=228), ""), (seen(5), seen(5, peak_mib=229), "memory grew by 129 MiB"),
    (seen(5, peak_mib=500), seen(5, peak_mib=500), ""), (seen(5), seen(5, memory_mib=150, peak_mib=150), ""),
    (seen(5, peak_mib=500), seen(5, memory_mib=229, peak_mib=500), "memory grew by 129 MiB"),
    (seen(5), seen(5, failures=("status 503",)), "/health during cases: status 503"), (seen(None), seen(None), ""),
])  # fmt: skip
def test_waiting_and_memory_have_limits(before: ServerObservations, during: ServerObservations, what: str) -> None:
    group = check_side_effects(
        SelftestConfig(large_mib=16, max_lag_s=0.05), before, [("cases", during), ("no cases", seen(1))]
    )
    assert what in " ".join(group.failures) and bool(what) == bool(group.failures)
    assert "/health was asked 18 times" in table([group])


def test_a_server_that_shows_no_figures_is_tested_all_the_same() -> None:
    group = check_side_effects(SelftestConfig(), ServerObservations(), [("cases", ServerObservations(num_polls=1))])
    assert (group.num_tried, group.failures) == (1, [])


def test_large_bodies_are_of_every_route_and_as_large_as_wished() -> None:
    bodies = list(cases.large_bodies(10_000))
    assert {path for path, _ in bodies} == set(cases.VALID)
    assert all(4_000 < len(body) < 21_000 for _, body in bodies)
