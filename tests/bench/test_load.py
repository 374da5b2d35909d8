"""Open and closed loops, and what alone on the server means."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from scripted_server import ScriptedServer, token, usage

from megatron_medha.bench import load_generator as load
from megatron_medha.bench.client import Target, TokenRange
from megatron_medha.bench.idle import BenchError, IdleTimes, lengths_between, measure_idle
from megatron_medha.bench.load_generator import LoadClient, SentRequest, closed_loop, open_loop
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending
from megatron_medha.stats.slo_targets import Slo


def requests(count: int, every_s: float = 0.0) -> list[Request]:
    return [
        Request(request_id=f"r{i}", num_prompt_tokens=4, max_output_tokens=2, arrival_s=i * every_s)
        for i in range(count)
    ]


def under_load(
    server: ScriptedServer,
    run: Callable[[LoadClient, Callable[[SentRequest], None]], Awaitable[None]],
    slo: Slo | None = None,
) -> list[SentRequest]:
    sent: list[SentRequest] = []

    async def go() -> None:
        async with server.running():
            target = Target(url=server.url)
            async with target.session() as session:
                client = LoadClient(
                    target=target, session=session, model="scripted", tokens=TokenRange(), slo=slo or Slo(), seed=0,
                    isolated_s=lambda num_tokens: 0.25,
                )  # fmt: skip
                await run(client, sent.append)

    asyncio.run(go())
    return sent


TWO_TOKENS = [token(), token(finish_reason="length"), usage(2)]


def test_in_an_open_loop_requests_go_out_at_their_time_whoever_is_still_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "_PREPARE_S", 0.05)
    server = ScriptedServer(TWO_TOKENS, holds=asyncio.Event())

    async def run(client: LoadClient, note: Callable[[SentRequest], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(open_loop(client, requests(5, every_s=0.01), note))
            while server.num_at_once < 5:  # none has had an answer, and all are there
                await asyncio.sleep(0.001)
            assert server.holds is not None
            server.holds.set()

    sent = under_load(server, run)

    assert {one.outcome.request.request_id for one in sent} == {f"r{i}" for i in range(5)}
    assert {one.outcome.ending for one in sent} == {Ending.FINISHED}
    for one in sent:
        assert one.send_lag_s >= 0.0
        assert one.outcome.ttft_s is not None and one.outcome.ttft_s >= one.send_lag_s  # from the planned arrival
        assert one.outcome.isolated_s == 0.25
        assert one.outcome.max_tbt_s == pytest.approx(one.token_times_s[1] - one.token_times_s[0])


def test_in_a_closed_loop_so_many_are_under_way_and_no_more() -> None:
    server = ScriptedServer(TWO_TOKENS, holds=asyncio.Event())

    async def run(client: LoadClient, note: Callable[[SentRequest], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(closed_loop(client, requests(20), 3, note))
            while server.num_at_once < 3:
                await asyncio.sleep(0.001)
            assert server.holds is not None
            server.holds.set()

    sent = under_load(server, run)

    assert len(sent) == 20
    assert server.most_at_once == 3
    arrivals_s = [one.outcome.request.arrival_s for one in sent]
    assert len(set(arrivals_s)) > 1 and min(arrivals_s) >= 0.0  # arrival is when each was sent


@pytest.mark.parametrize("num_allowed", [1, 20])
def test_refused_requests_are_outcomes_too(num_allowed: int) -> None:
    server = ScriptedServer(status=429, error={"error": {"message": "full"}})

    sent = under_load(server, lambda client, note: closed_loop(client, requests(3), num_allowed, note))

    assert [(one.outcome.ending, one.outcome.why) for one in sent] == [(Ending.REJECTED, "full")] * 3
    assert not any(Slo().is_met(one.outcome) for one in sent)


def test_a_target_between_tokens_is_counted_with_its_slack() -> None:
    sent = under_load(
        ScriptedServer(TWO_TOKENS), lambda client, note: closed_loop(client, requests(1), 1, note), Slo(tbt_s=10.0)
    )

    assert sent[0].outcome.deadline_miss_rate == 0.0


def test_idle_times_lie_on_straight_lines_between_what_was_measured() -> None:
    idle = IdleTimes((100, 200, 400), (1.0, 2.0, 6.0))

    assert [idle.at(n) for n in (10, 100, 150, 300, 400, 800)] == [1.0, 1.0, 1.5, 4.0, 6.0, 12.0]


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(100, 100, (100,)), (100, 150, (100, 150)), (100, 900, (100, 200, 400, 800, 900)), (1, 4, (1, 2, 4))],
)
def test_lengths_double_from_the_shortest_to_the_longest(least: int, most: int, expected: tuple[int, ...]) -> None:
    assert lengths_between(least, most) == expected


def measured(server: ScriptedServer) -> tuple[IdleTimes, list[int]]:
    noted: list[int] = []

    async def go() -> IdleTimes:
        async with server.running():
            target = Target(url=server.url)
            async with target.session() as session:
                return await measure_idle(
                    target, session, "scripted", TokenRange(), (8, 16, 20), 0, lambda n, seconds: noted.append(n)
                )

    return asyncio.run(go()), noted


def test_each_length_is_measured_alone_and_times_never_fall() -> None:
    server = ScriptedServer([token(finish_reason="length"), usage(1)])
    idle, noted = measured(server)

    assert noted == [8, 16, 20]
    assert server.most_at_once == 1
    assert [len(body["prompt"]) for body in server.bodies] == [8, 8, 8, 16, 16, 16, 20, 20, 20]
    assert list(idle.seconds) == sorted(idle.seconds)


def test_a_prompt_that_fails_even_alone_ends_the_run_with_its_length() -> None:
    with pytest.raises(BenchError, match="a prompt of 8 tokens alone on the server failed: too long"):
        measured(ScriptedServer(status=400, error={"error": {"message": "too long"}}))
