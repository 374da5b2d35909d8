"""Prefixes that are found: over the real scheduler and a simulated replica, as clients and operators see them."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_server import FAST, NO_LAUNCHES, SHAPE, WAIT_S, LiveEngine
from prometheus_client.parser import text_string_to_metric_families
from running_server import Running, StartServer, eventually, spec

from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.prefix_keys import GranuleKeys, root_key
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import Delivery, EnginePhase, TokenDelivery
from megatron_medha.core.request import Rejection, Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.engine import Engine
from megatron_medha.engine.replicas import Replicas
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.server.admission import AdmissionTicket
from megatron_medha.server.api_keys import ApiClient
from megatron_medha.server.ttft_estimate import PendingPrefills
from megatron_medha.sim.live import live_engine
from megatron_medha.stats.snapshot import take_snapshot

COMPLETIONS = "/v1/completions"
GRANULE = 64
PROMPT = [place % 250 for place in range(1000)]


@pytest.fixture
def start_live(start_server: StartServer) -> Callable[..., Running]:
    def start(**settings: Any) -> Running:
        engine = LiveEngine(kv=KVConfig(granule_tokens=GRANULE))
        server = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics, **settings)
        eventually(lambda: server.get("/ready").status_code == 200)
        return server

    return start


def answered(server: Running, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 2, "return_token_ids": True, **fields}
    response = server.post(COMPLETIONS, body, headers=headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def num_cached(server: Running, headers: dict[str, str] | None = None, **fields: Any) -> int:
    usage = answered(server, headers, **fields)["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def whole_granules(num_tokens: int) -> int:
    return num_tokens // GRANULE * GRANULE


def test_a_turn_finds_the_prompt_and_the_answer_of_the_one_before(start_live: Callable[..., Running]) -> None:
    server = start_live()
    assert num_cached(server) == 0
    assert num_cached(server) == whole_granules(len(PROMPT) - 1)
    first = answered(server, max_tokens=200, ignore_eos=True)
    said = first["choices"][0]["token_ids"]
    # The last output token is never computed.
    assert num_cached(server, prompt=PROMPT + said + [1] * 100) == whole_granules(len(PROMPT) + len(said) - 1)
    assert num_cached(server, prompt=[9] * GRANULE) == 0


def test_a_prompt_that_is_cached_whole_has_its_last_granule_computed(start_live: Callable[..., Running]) -> None:
    server, prompt = start_live(), PROMPT[: 4 * GRANULE]
    assert [num_cached(server, prompt=prompt) for _ in range(2)] == [0, 3 * GRANULE]
    assert num_cached(server, prompt=[*prompt, 1]) == 4 * GRANULE


def test_who_asks_not_to_take_part_takes_and_leaves_nothing(start_live: Callable[..., Running]) -> None:
    server = start_live()
    assert [num_cached(server, cache_prompt=False) for _ in range(2)] == [0, 0]
    assert num_cached(server, echo=True, logprobs=0) == 0
    assert num_cached(server, echo=True, logprobs=0) == 0  # it takes nothing
    assert num_cached(server) == whole_granules(len(PROMPT))  # but has left it
    assert num_cached(server, cache_prompt=False) == 0


def test_salts_and_keys_that_are_isolated_find_nothing_of_each_other(
    start_live: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text("alice secret-a\nbob secret-b\n")
    path.chmod(0o600)
    alice, bob = ({"authorization": f"Bearer secret-{name}"} for name in "ab")
    server = start_live(api_key_file=path, isolates_keys=True)
    whole = whole_granules(len(PROMPT))
    assert [num_cached(server, headers) for headers in (alice, bob, alice, bob)] == [0, 0, whole, whole]
    assert [num_cached(server, alice, cache_salt=salt) for salt in "xyx"] == [0, 0, whole]


def test_choices_and_prompts_of_one_call_share_what_is_computed_once(start_live: Callable[..., Running]) -> None:
    server = start_live()
    assert num_cached(server, n=4) == 0
    metrics = metrics_of(server)
    assert metrics["medha:prefix_cache_hits_total"] >= 3 * whole_granules(len(PROMPT))


def metrics_of(server: Running) -> dict[str, float]:
    """By name, over all labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def test_hits_are_counted_with_the_time_that_they_save(start_live: Callable[..., Running]) -> None:
    server, whole = start_live(), whole_granules(len(PROMPT))
    for _ in range(3):
        answered(server)
    metrics = metrics_of(server)
    assert metrics["vllm:prefix_cache_queries_total"] == 3 * len(PROMPT)
    assert metrics["vllm:prefix_cache_hits_total"] == metrics["medha:cached_prompt_tokens_total"] == 2 * whole
    assert metrics["medha:prefix_cache_saved_seconds_total"] > 0
    assert metrics["medha:prompt_tokens_total"] == 3 * len(PROMPT)


def test_idle_times_before_a_reuse_and_before_an_eviction_are_counted(start_server: StartServer) -> None:
    engine = LiveEngine(kv=KVConfig(granule_tokens=GRANULE), num_blocks=100)  # of 16 tokens
    server = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics)
    eventually(lambda: server.get("/ready").status_code == 200)
    for _ in range(2):
        answered(server)
    answered(server, prompt=PROMPT[::-1])
    eventually(lambda: metrics_of(server)["medha:prefix_eviction_age_seconds_count"] > 0)  # with the next snapshot
    metrics = metrics_of(server)
    assert metrics["medha:prefix_reuse_gap_seconds_count"] == 1
    # 63 blocks are needed, 40 are free beside 15 cached granules of 4 blocks.
    assert metrics["medha:prefix_eviction_age_seconds_count"] == 6


def test_debug_routes_say_what_was_cached_and_how_much_of_kv_is(start_live: Callable[..., Running]) -> None:
    server = start_live()
    answered(server)
    body = {"prompt": PROMPT, "max_tokens": 2, "session_id": "s"}
    response_id = server.post(COMPLETIONS, body).json()["id"]
    [choice] = server.get(f"/debug/requests/{response_id}").json()["choices"]
    assert (choice["num_cached_tokens"], choice["session_id"]) == (whole_granules(len(PROMPT)), "anonymous s")
    eventually(lambda: server.engine.load.num_cached_blocks > 0)  # the next snapshot has it
    num_cached_blocks = whole_granules(len(PROMPT)) // 16
    live = server.get("/debug/live").json()
    assert live["load"]["num_cached_blocks"] == metrics_of(server)["medha:num_cached_blocks"] == num_cached_blocks
    # They are as good as free.
    assert live["load"]["num_free_blocks"] == live["load"]["num_blocks"]
    assert (live["num_prefix_queries"], live["num_prefix_hits"]) == (2 * len(PROMPT), whole_granules(len(PROMPT)))


def test_what_is_cached_is_no_work_for_the_estimate(start_live: Callable[..., Running]) -> None:
    server = start_live()
    answered(server)
    root, scheduler = server.service.prefix_root(server.engine.facts, ""), server.engine.audit.scheduler
    assert root is not None and scheduler is not None
    [new] = spec(len(PROMPT)).requests()
    known = replace(new, prefix_keys=GranuleKeys(root, GRANULE).extend(array("i", PROMPT)))
    whole = whole_granules(len(PROMPT))
    cached = [scheduler.num_cached_tokens(one) for one in (new, known, replace(known, reads_cache=False))]
    assert cached == [0, whole, 0]
    pending = PendingPrefills.of(take_snapshot(scheduler))
    assert pending.predict([known]).ttft_s < pending.predict([new]).ttft_s
    # What two of one call share is computed once, though nothing of it is cached yet.
    other = replace(new, prefix_keys=GranuleKeys(root, GRANULE).extend(array("i", PROMPT[::-1])))
    twice_s = scheduler.predicted_prefill_s(len(PROMPT)) + scheduler.predicted_work_s(len(PROMPT), whole)
    assert pending.predict([other, other]).ttft_s == twice_s


class Deliveries:
    """Of two replicas, with a way to wait for a request's end."""

    def __init__(self) -> None:
        self.num_cached: dict[str, int] = {}
        self.ended: set[str] = set()
        self._changed = threading.Condition()

    def take(self, deliveries: Sequence[Delivery]) -> None:
        with self._changed:
            for delivery in deliveries:
                assert isinstance(delivery, TokenDelivery)
                self.num_cached.setdefault(delivery.request_id, delivery.num_cached_tokens)
                if delivery.finish_reason is not None:
                    self.ended.add(delivery.request_id)
            self._changed.notify_all()

    def wait(self, request_id: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: request_id in self.ended, WAIT_S)


def test_a_turn_goes_to_the_replica_that_has_the_one_before() -> None:
    setup = SchedulerSetup(
        config=SchedulerConfig(), shape=SHAPE, hardware=FAST, engine=replace(NO_LAUNCHES, step_s=1e-3),
        layout=ParallelLayout(), num_blocks=600, block_size=16, kv=KVConfig(granule_tokens=GRANULE),
    )  # fmt: skip
    engines = [live_engine(setup=setup) for _ in range(2)]
    replicas, got = Replicas(engines), Deliveries()
    replicas.start(got.take)
    eventually(lambda: replicas.status.phase is EnginePhase.READY)

    def send(request_id: str, tokens: Sequence[int], num_outputs: int = 1) -> Engine:
        keys, prompt = GranuleKeys(root_key(b"secret"), GRANULE), array("i", tokens)
        request = Request(
            request_id=request_id, num_prompt_tokens=len(prompt), max_output_tokens=num_outputs,
            arrival_s=replicas.now_s(), prefix_keys=keys.extend(prompt),
        )  # fmt: skip
        replicas.submit(request, prompt, Sampling(max_output_tokens=num_outputs), keys)
        return replicas._places[request_id] if request_id in replicas._places else engines[0]

    assert send("busy", PROMPT[::-1], 3000) is engines[0]
    first = send("first", PROMPT)
    got.wait("first")
    replicas.abort("busy")
    eventually(lambda: not any(engine.load.num_decoding or engine.load.num_waiting for engine in engines))
    assert first is engines[1]
    assert [engine.load_for(request_of(PROMPT)).prompt_s for engine in engines] == sorted(
        (engine.load_for(request_of(PROMPT)).prompt_s for engine in engines), reverse=True
    )
    send("second", [*PROMPT, 7])
    got.wait("second")
    assert (got.num_cached["first"], got.num_cached["second"]) == (0, whole_granules(len(PROMPT)))
    replicas.stop(WAIT_S)


def request_of(tokens: Sequence[int]) -> Request:
    keys = GranuleKeys(root_key(b"secret"), GRANULE).extend(array("i", tokens))
    return Request(
        request_id="x", num_prompt_tokens=len(tokens), max_output_tokens=1, arrival_s=0.0, prefix_keys=keys
    )


def test_what_is_cached_does_not_count_as_waiting(start_live: Callable[..., Running]) -> None:
    server = start_live(max_waiting_tokens=len(PROMPT))
    answered(server)
    admission, forecast = server.service.admission, server.service.journal.forecast
    root = server.service.prefix_root(server.engine.facts, "")
    assert root is not None
    [new] = spec(len(PROMPT)).requests()
    known = replace(new, prefix_keys=GranuleKeys(root, GRANULE).extend(array("i", PROMPT)))
    num_new = len(PROMPT) - whole_granules(len(PROMPT))
    assert [forecast.num_uncached_tokens(one) for one in (new, known)] == [len(PROMPT), num_new]
    client = ApiClient("somebody")
    tickets = [admission.admit(server.service.config, client, [known]) for _ in range(5)]
    assert admission.num_waiting_tokens == 5 * num_new
    assert isinstance(admission.admit(server.service.config, client, [new]), Rejection)
    for ticket in tickets:
        assert isinstance(ticket, AdmissionTicket)
        ticket.close(0)
    assert admission.num_waiting_tokens == 0
