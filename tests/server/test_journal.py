"""What the server can tell: why a request waited, how far it is, what was predicted, and the numbers for it."""

from __future__ import annotations

import json
import re
import time

import msgspec
import pytest
from fake_engine import FakeEngine
from live_server import FAST, SHAPE, LiveEngine
from prometheus_client.parser import text_string_to_metric_families
from running_server import Running, StartServer, spec

from megatron_medha.core.batch import Aborted, Arrived, Batch, Completed, Event, Preempted
from megatron_medha.core.cost.step_cost import RooflineCost
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.server.admission import AdmissionControl
from megatron_medha.server.observe.metrics import Metrics, length_class
from megatron_medha.server.observe.metrics_page import MetricsPage
from megatron_medha.server.observe.queue_view import take_view
from megatron_medha.server.observe.request_log import (
    MAX_LOSSES,
    MAX_RUNS,
    MAX_TRACES,
    RequestLog,
    RunInterval,
    _thinned,
)
from megatron_medha.server.observe.steps import InFlightBatch, StepChunk, StepRecord
from megatron_medha.server.routes.debug_routes import WaitInterval, explain_trace
from megatron_medha.server.slo import SloClass, SloConfig
from megatron_medha.server.ttft_estimate import PendingPrefills
from megatron_medha.stats.snapshot import SnapshotObserver, take_snapshot

PATH = "/v1/completions"


class World:
    """A scheduler and its watch, driven by hand: each step takes a second."""

    def __init__(self, *, num_blocks: int = 1000, journal: RequestLog | None = None, **config: object) -> None:
        memory = KVMemory(num_blocks=num_blocks, block_size=16, max_context_len=4096, kvp=1, watermark=0.0)
        settings = {"max_batch_tokens": 64, "max_num_sequences": 8, "progress_share": 0.0, **config}
        self.scheduler = Scheduler(SchedulerConfig(**settings), RooflineCost(shape=SHAPE, hardware=FAST), memory)
        self.journal = RequestLog(Metrics()) if journal is None else journal
        self.metrics = self.journal.metrics
        self.watch = self.journal.watch(self.scheduler)
        self.snapshots = SnapshotObserver(self.scheduler, [self.watch])
        self.now_s = 0.0

    def handle(self, event: Event) -> None:
        outputs = self.scheduler.handle(event, self.now_s)
        self.watch.handled(event, outputs, self.now_s)
        self.snapshots.handled(event, outputs, self.now_s)

    def arrive(self, request_id: str, num_tokens: int, **fields: object) -> None:
        request = Request(
            request_id=request_id, num_prompt_tokens=num_tokens, max_output_tokens=2, arrival_s=self.now_s, **fields
        )
        self.handle(Arrived(request))

    def abort(self, request_id: str) -> None:
        self.handle(Aborted(request_id))

    def step(self, num_steps: int = 1) -> Batch | None:
        batch = None
        for _ in range(num_steps):
            batch = self.scheduler.schedule(self.now_s)
            if batch is None:
                return None
            self.watch.scheduled(batch, self.now_s)
            self.snapshots.scheduled(batch, self.now_s)
            self.now_s += 1.0
            self.handle(Completed(batch_id=batch.batch_id, duration_s=0.5))
        return batch

    def told(self, request_id: str) -> list[WaitInterval | RunInterval]:
        trace = self.journal.trace(request_id)
        assert trace is not None
        return explain_trace(trace, self.journal.steps_between(0.0, self.now_s), self.now_s).timeline


def test_metrics_count_what_the_scheduler_does() -> None:
    world = World()
    world.now_s = 1.0
    world.arrive("r", 8)
    world.now_s = 3.0
    batch = world.step()
    assert batch is not None
    world.watch.handled(Completed(batch_id=-1, duration_s=0.0), [Preempted("r", 5)], world.now_s)
    engine = FakeEngine()
    admission = AdmissionControl(engine.now_s, world.journal.forecast)
    page = MetricsPage(world.metrics, engine, admission).render("m").decode()
    samples = {
        sample.name: sample.value for family in text_string_to_metric_families(page) for sample in family.samples
    }
    assert samples["medha:request_queue_time_seconds_sum"] == 2.0
    assert samples["medha:request_prefill_time_seconds_sum"] == 1.0
    assert samples["medha:step_predicted_seconds_sum"] == batch.predicted_s
    assert samples["medha:step_actual_seconds_sum"] == 0.5
    assert samples["medha:step_prediction_relative_error_sum"] == pytest.approx(abs(batch.predicted_s / 0.5 - 1))
    assert samples["medha:step_actual_over_predicted_ratio_sum"] == pytest.approx(0.5 / batch.predicted_s)
    assert samples["medha:iteration_tokens_total_sum"] == 8
    assert samples["medha:num_preemptions_total"] == 1
    assert samples["medha:preempted_tokens_total"] == 5


def test_a_story_says_who_went_first_and_that_the_kv_was_kept() -> None:
    world = World()
    world.arrive("long", 640)
    world.step(3)
    world.arrive("urgent", 128, priority=-1)
    world.step(9)
    first, wait, second = world.told("long")
    assert isinstance(first, RunInterval) and (first.from_s, first.num_chunks, first.num_tokens) == (0.0, 3, 192)
    assert isinstance(wait, WaitInterval) and wait.why == "others were more urgent; its KV was kept"
    assert wait.num_steps == 2
    assert [(one["request_id"], one["num_tokens"]) for one in wait.went_first] == [("urgent", 128)]
    assert isinstance(second, RunInterval) and second.start == 192
    assert world.metrics.num_paused_prefills == 1 and world.metrics.num_recomputed_tokens == 0
    trace = world.journal.trace("long")
    assert trace is not None and trace.num_pauses == 1


def test_a_wait_after_a_loss_does_not_say_that_the_kv_was_kept() -> None:
    world = World()
    world.arrive("long", 640)
    world.step(3)
    world.arrive("urgent", 1280, priority=-1)
    seq = world.scheduler.sequence("long")
    assert seq is not None
    world.scheduler._restart(seq, world.now_s)
    world.watch.handled(Completed(batch_id=-1, duration_s=0.0), [Preempted("long", 192)], world.now_s)
    world.step(3)
    last = world.told("long")[-1]
    assert isinstance(last, WaitInterval) and last.why == "others were more urgent"


def test_a_story_says_that_memory_was_missing() -> None:
    world = World(num_blocks=20)
    world.arrive("holder", 300)
    world.step(2)
    world.arrive("waiter", 200)
    world.step(3)
    [wait] = world.told("waiter")
    assert isinstance(wait, WaitInterval) and wait.why == "not enough free KV memory"


def test_slack_falls_while_a_request_waits_and_stands_while_it_runs() -> None:
    world = World()
    world.arrive("a", 64, ttft_slo_s=100.0)
    world.arrive("b", 64, ttft_slo_s=200.0)
    world.step(2)
    trace = world.journal.trace("b")
    assert trace is not None
    slack = explain_trace(trace, [], world.now_s).slack
    assert slack[0][1] == pytest.approx(200.0, abs=0.1) and slack[1][1] == pytest.approx(199.0, abs=0.1)


def test_tokens_computed_again_after_a_loss_are_counted() -> None:
    world = World()
    world.arrive("r", 128)
    world.step(2)  # two chunks, and with them the first token
    seq = world.scheduler.sequence("r")
    assert seq is not None
    world.scheduler._restart(seq, world.now_s)
    world.watch.handled(Completed(batch_id=-1, duration_s=0.0), [Preempted("r", 128)], world.now_s)
    world.step(2)
    assert world.metrics.num_recomputed_tokens == 128
    trace = world.journal.trace("r")
    assert trace is not None and [lost.num_tokens for lost in trace.losses] == [128]


def test_deadlines_are_counted_by_length_and_class_and_bubbles_by_time() -> None:
    world = World()
    world.arrive("quick", 64, ttft_slo_s=5.0, slo_class="interactive")
    world.arrive("late", 2000, ttft_slo_s=2.0, slo_class="batch")
    world.step(60)
    assert world.metrics.num_deadlines_met == {("1k", "interactive"): 1}
    assert world.metrics.num_deadlines_missed == {("10k", "batch"): 1}
    assert sum(world.metrics.relative_slack.counts) == 2
    assert world.metrics.stage_busy_s == pytest.approx(0.5 * world.now_s, rel=0.05)
    assert world.metrics.work_present_s == pytest.approx(world.now_s, rel=0.05)
    assert [length_class(n) for n in (1, 1000, 1001, 10**6, 10**6 + 1)] == ["1k", "1k", "10k", "1m", "longer"]


def test_a_long_prompt_keeps_its_progress_however_many_come_and_go_meanwhile() -> None:
    world = World()
    world.arrive("long-0", 4000, ttft_slo_s=1e6)
    world.step(3)
    for number in range(MAX_TRACES + 10):
        world.arrive(f"short-{number}", 16)
        world.abort(f"short-{number}")
    share = world.journal.progress("long-0", world.now_s).share
    assert share == pytest.approx(3 * 64 / 4000)
    assert world.journal.trace("long-0") is not None and world.journal.trace("short-0") is None


def test_live_requests_are_all_remembered_and_ended_ones_up_to_a_bound() -> None:
    world = World()
    for number in range(MAX_TRACES + 10):
        world.arrive(f"r{number}", 16)
    assert len(world.journal.traces) == MAX_TRACES + 10
    for number in range(100, MAX_TRACES + 10):
        world.abort(f"r{number}")
    assert len(world.journal.traces) == MAX_TRACES
    assert world.journal.trace("r0") is not None and world.journal.trace("r100") is None
    world.arrive("r105", 16)  # the name of one that has ended
    for number in range(20):
        world.arrive(f"late-{number}", 16)
        world.abort(f"late-{number}")
    assert world.journal.trace("r105") is not None


def test_a_story_remembers_so_many_runs_and_losses_only() -> None:
    world = World()
    world.arrive("r", 128)
    trace = world.journal.traces["r"]
    trace.runs = [RunInterval(i, i + 0.5, (2 * i, 2 * i), 32 * i, 32, 1, 0.0, 0.0) for i in range(MAX_RUNS + 1)]
    thin = _thinned(trace.runs)
    assert len(thin) <= MAX_RUNS // 2 + 1
    assert (thin[0].from_s, thin[-1].until_s) == (0, MAX_RUNS + 0.5)
    assert sum(run.num_tokens for run in thin) == 32 * (MAX_RUNS + 1)
    for number in range(3 * MAX_LOSSES):
        world.watch.handled(Completed(batch_id=-1, duration_s=0.0), [Preempted("r", number)], world.now_s)
    assert [lost.num_tokens for lost in trace.losses] == list(range(2 * MAX_LOSSES, 3 * MAX_LOSSES))


def test_summaries_read_no_runs_while_the_engine_waits_for_the_lock() -> None:
    world = World()
    world.arrive("r", 128)
    world.step()
    trace = world.journal.traces["r"]
    trace.runs = trace.losses = object()  # type: ignore[assignment]  # nothing can be read of it
    (summary,) = world.journal.recent(10)
    assert (summary.request_id, summary.num_scheduled_tokens, summary.outcome) == ("r", 64, "")


def test_a_copied_story_stays_as_it_was_while_the_request_goes_on() -> None:
    world = World()
    world.arrive("r", 256)
    world.step()
    copied = world.journal.trace("r")
    assert copied is not None
    world.step(2)
    assert [run.num_tokens for run in copied.runs] == [64]
    assert [run.num_tokens for run in world.journal.traces["r"].runs] == [192]


# ---- predictions ----


def test_only_what_is_due_earlier_goes_before_a_prompt() -> None:
    world = World()
    world.arrive("long", 4000, ttft_slo_s=1000.0)
    world.arrive("short", 64, ttft_slo_s=1.0)
    world.arrive("cheap", 640, ttft_slo_s=1.0, priority=1)
    ahead = PendingPrefills.of(take_snapshot(world.scheduler))
    work = {seq.request_id: seq.remaining_work_s for seq in world.scheduler.sequences}
    assert ahead.queued_ahead(0, 0.5).work_s == 0.0
    assert ahead.queued_ahead(0, 2.0).work_s == pytest.approx(work["short"])
    assert ahead.queued_ahead(0, 2000.0).work_s == pytest.approx(work["short"] + work["long"])
    assert ahead.queued_ahead(1, 2.0).work_s == pytest.approx(sum(work.values()))
    fcfs = World(policy="fcfs")
    fcfs.arrive("long", 4000)
    assert PendingPrefills.of(take_snapshot(fcfs.scheduler)).queued_ahead(0, 0.1).num_prompts == 1


def live(start_server: StartServer, engine: LiveEngine, **settings: object) -> Running:
    server = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics, **settings)
    while server.get("/ready").status_code != 200:
        time.sleep(0.001)  # the engine's thread starts; nothing tells
    return server


def test_what_would_be_late_is_refused_with_its_prediction_and_the_rest_is_served(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = live(start_server, engine, reject_late=True)
    engine.audit.stop_at(lambda scheduler: scheduler.num_sequences > 0)
    ahead = server.connect(PATH, json.dumps({"prompt": [1] * 4000, "max_tokens": 2}).encode())
    engine.audit.wait_until_stopped()
    late = server.post(PATH, {"prompt": [1] * 4000, "max_tokens": 2}, headers={"x-slo-ttft-ms": "1"})
    assert late.status_code == 429 and late.json()["error"]["code"] == "deadline_would_be_missed"
    assert int(late.headers["retry-after"]) >= 1 and int(late.headers["x-predicted-ttft-ms"]) > 1
    engine.audit.go_on()
    assert server.post(PATH, {"prompt": [1] * 40}, headers={"x-slo-ttft-ms": "60000"}).status_code == 200
    ahead.close()
    engine.wait_until_idle()


def test_what_was_admitted_a_moment_ago_counts_before_the_engine_has_told_of_it(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = live(start_server, engine)
    forecast = server.service.journal.forecast
    alone = forecast.predict(spec(2000).requests())
    forecast.reserve(spec(2000).requests())
    behind = forecast.predict(spec(2000).requests())
    assert alone is not None and behind is not None
    assert alone.ahead_s == 0.0 and behind.ahead_s == pytest.approx(alone.ttft_s)


# ---- over HTTP ----


def test_progress_comments_come_only_to_those_who_ask(start_server: StartServer) -> None:
    for headers, settings, is_told in (
        ({"x-medha-progress": "1"}, {}, True),
        ({}, {"sse_progress_s": 0.01}, True),
        ({"x-medha-progress": "0"}, {"sse_progress_s": 0.01}, False),
        ({}, {}, False),
    ):
        engine = LiveEngine()
        server = live(start_server, engine, sse_header_wait_s=0.0, **settings)
        engine.audit.stop_at(lambda scheduler: any(seq.num_scheduled_tokens >= 2000 for seq in scheduler.sequences))
        body = {"prompt": [1] * 4000, "max_tokens": 1, "stream": True}
        with server.client.stream("POST", PATH, json=body, headers=headers) as response:
            engine.audit.wait_until_stopped()
            engine.audit.go_on()
            lines = [line for line in response.iter_lines() if line.startswith(":")]
        shares = [float(match[1]) for line in lines if (match := re.match(r": prefill ([\d.]+)% eta_s=[\d.]+ ", line))]
        assert bool(shares) == is_told and shares == sorted(shares), lines
    assert server.post(PATH, {"prompt": "a"}, headers={"x-medha-progress": "maybe"}).status_code == 400


def test_a_wait_is_explained_by_the_requests_own_replica_and_a_look_shows_all() -> None:
    worlds = [World()]
    journal = worlds[0].journal
    worlds.append(World(journal=journal))
    for replica, world in enumerate(worlds):
        world.arrive(f"long-{replica}", 640)
        world.step(3)
        world.arrive(f"urgent-{replica}", 128, priority=-1)
    journal.look(3.0)
    for world in worlds:
        world.step()
    view = journal.look(4.0)
    assert view is not None and view.num_replicas == 2 and len(view.num_free_blocks) == 2
    assert {(one.request_id, one.replica) for one in view.queue} == {
        ("long-0", 0), ("urgent-0", 0), ("long-1", 1), ("urgent-1", 1),
    }  # fmt: skip
    worlds[0].step()
    while worlds[1].step():
        pass
    left = journal.look(5.0)
    assert left is not None and {one.replica for one in left.queue} == {0}
    worlds[0].step(8)
    for replica, world in enumerate(worlds):
        waits = [entry for entry in world.told(f"long-{replica}") if isinstance(entry, WaitInterval)]
        assert {went["request_id"] for wait in waits for went in wait.went_first} == {f"urgent-{replica}"}


@pytest.mark.parametrize(
    ("settings", "priority", "why"),
    [
        ({"policy": "fcfs"}, 0, "others go first: they came earlier"),
        ({"policy": "srpt"}, 0, "others go first: they have less left to compute"),
        ({"policy": "lars"}, 1, "a request of higher priority goes first"),
        ({"min_deadline_s": 0.001}, 0, "it can no longer meet its deadline: others that can go first"),
    ],
)
def test_the_queue_says_in_words_why_a_prompt_waits_and_which_ones_go_first(
    settings: dict[str, object], priority: int, why: str
) -> None:
    world = World(**{"has_space_sharing": False, "min_deadline_s": 9.0, **settings})
    is_late = settings.get("min_deadline_s") == 0.001
    early, late = ("second", "first") if is_late else ("first", "second")
    world.arrive(early, 640 + 640 * is_late, priority=priority * is_late)
    world.now_s = 0.5
    world.arrive(late, 1280 - 640 * is_late, priority=priority)
    batch = world.scheduler.schedule(world.now_s)
    assert batch is not None
    world.watch.scheduled(batch, world.now_s)
    view = take_view(take_snapshot(world.scheduler), tuple(world.journal.steps), world.now_s, 0)
    queue = {one.request_id: one for one in view.queue}
    assert (queue["first"].why, queue["first"].ahead) == ("running", ())
    assert (queue["second"].why, queue["second"].ahead) == (why, ("first",))


def test_the_debug_routes_tell_the_story_of_an_answer(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = live(start_server, engine)
    answer = server.post(PATH, {"prompt": [1] * 640, "max_tokens": 2, "n": 2}).json()
    trace = server.get(f"/debug/requests/{answer['id']}").json()
    assert [choice["request_id"] for choice in trace["choices"]] == [f"{answer['id']}-0", f"{answer['id']}-1"]
    first = trace["choices"][0]
    assert first["outcome"] == "length" and first["num_scheduled_tokens"] == 640 and first["slo_class"] == "standard"
    assert 0 <= first["first_scheduled_s"] < first["first_token_s"] <= first["ended_s"]
    one = server.get(f"/debug/requests/{answer['id']}-1").json()["choices"]
    assert len(one) == 1
    assert server.get("/debug/requests/nobody").status_code == 404
    assert [entry["request_id"] for entry in server.get("/debug/requests").json()["requests"]][0].startswith("cmpl-")
    live_view = server.get("/debug/live").json()
    assert live_view["status"] == "ready" and live_view["view"]["queue"] == []
    assert live_view["ttft"]["num"] == 2 and live_view["ttft"]["p50_s"] <= live_view["ttft"]["p99_s"]
    assert live_view["inter_token"]["num"] > 0 and live_view["history"]
    assert server.get(f"/debug/live?since={live_view['now_s'] + 1000}").json()["history"] == []
    assert server.get("/debug/live?since=yesterday").status_code == 400
    assert "medha:relative_slack_at_first_token_bucket" in server.get("/metrics").text


def test_the_schedule_shows_who_waits_and_why(start_server: StartServer) -> None:
    # The holder decodes for fifty seconds, unless it is let go.
    engine = LiveEngine(num_blocks=220, policy="fcfs", step_s=0.1, max_batch_tokens=1024)
    server = live(start_server, engine)
    server.get("/debug/schedule")
    holder = server.connect(PATH, json.dumps({"prompt": [1] * 3000, "max_tokens": 500, "ignore_eos": True}).encode())
    engine.audit.wait_for(lambda scheduler: scheduler.memory.num_free_blocks < 40)
    waiter = server.connect(PATH, json.dumps({"prompt": [2] * 2000, "max_tokens": 5}).encode())
    queue: list = []
    while not any(entry["num_prompt_tokens"] == 2000 for entry in queue):
        queue = server.get("/debug/schedule").json()["view"]["queue"]
    [entry] = [entry for entry in queue if entry["num_prompt_tokens"] == 2000]
    assert entry["why"] == "not enough free KV memory" and entry["status"] == "waiting"
    assert entry["slack_s"] < entry["deadline_in_s"]
    holder.close()
    waiter.close()
    engine.wait_until_idle()


def test_chunks_of_a_batch_in_flight_have_the_name_that_the_dashboard_reads() -> None:
    record = StepRecord(7, 0, 1.0, (StepChunk("a", 0, 16, 0.5, (0,)),), 0, 16, 0.1, 0.1, 3)
    chunk = {"request_id": "a", "start": 0, "num_tokens": 16, "relative_slack": 0.5, "kvp_ranks": [0]}
    batch = json.loads(msgspec.json.encode(InFlightBatch(**msgspec.structs.asdict(record), age_s=0.25)))
    assert batch["parts"] == [chunk] and batch["age_s"] == 0.25 and "chunks" not in batch
    assert json.loads(msgspec.json.encode(record))["chunks"] == [chunk]  # of /debug/schedule's steps


# ---- classes ----


@pytest.mark.parametrize(
    ("headers", "fields", "name", "priority"),
    [
        ({}, {}, "standard", 0),
        ({"x-slo-class": "batch"}, {}, "batch", 1),
        ({}, {"service_tier": "flex"}, "batch", 1),
        ({}, {"service_tier": "priority"}, "interactive", -1),
        ({}, {"service_tier": "interactive"}, "interactive", -1),
        ({}, {"service_tier": "auto"}, "standard", 0),
        ({"x-slo-class": "batch"}, {"service_tier": "priority"}, "batch", 1),
        ({"x-slo-class": "batch"}, {"priority": -5}, "batch", -5),
        ({"x-gateway-inference-objective": "batch"}, {}, "batch", 1),
        ({"x-gateway-inference-objective": "another-team"}, {}, "standard", 0),
    ],
)
def test_a_request_gets_the_class_it_names(
    start_server: StartServer, headers: dict, fields: dict, name: str, priority: int
) -> None:
    server = start_server()
    assert server.post(PATH, {"prompt": "a", **fields}, headers=headers).status_code == 200
    request = server.engine.submitted[0].request
    assert (request.slo_class, request.priority) == (name, priority)
    assert request.deadline_multiplier == (20.0 if name == "batch" else None)


def test_an_unknown_class_is_refused_and_the_default_can_be_chosen(start_server: StartServer) -> None:
    server = start_server(FakeEngine(), slo=SloConfig(default_class="batch", batch=SloClass(priority=3)))
    assert server.post(PATH, {"prompt": "a"}).status_code == 200
    assert server.engine.submitted[0].request.priority == 3
    refused = server.post(PATH, {"prompt": "a"}, headers={"x-slo-class": "gold"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "x-slo-class"


def test_batch_work_yields_to_interactive_work_without_starving() -> None:
    world = World(progress_share=0.1, step_budget_s=0.05)
    batch = {"priority": 1, "slo_class": "batch", "deadline_multiplier": 20.0, "min_deadline_s": 60.0}
    world.arrive("batch", 640, **batch)
    first_tokens: dict[str, float] = {}
    for number in range(400):  # each second brings more interactive work than a step can do
        world.arrive(f"i{number}", 128, priority=-1, slo_class="interactive")
        world.step()
        trace = world.journal.trace("batch")
        assert trace is not None
        if trace.first_token_s is not None:
            break
        if number == 50:
            assert trace.num_scheduled_tokens == 0  # not due yet: it has yielded
            first_tokens["waited"] = world.now_s
    assert first_tokens and trace.first_token_s is not None and trace.first_token_s > 60.0


def test_the_first_token_of_a_finished_request_is_in_the_story() -> None:
    world = World()
    world.arrive("r", 10)
    world.step(2)
    trace = world.journal.trace("r")
    assert trace is not None and (trace.first_token_s, trace.ended_s, trace.outcome) == (1.0, 2.0, "length")
    assert world.journal.request_ids_of("r") == ["r"]


def test_with_two_replicas_what_was_admitted_goes_where_it_is_soonest(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = live(start_server, engine)
    assert engine.audit.scheduler is not None
    forecast = server.service.journal.forecast
    forecast.update(PendingPrefills.of(take_snapshot(engine.audit.scheduler)), 1)
    predicted = []
    for _ in range(4):
        predicted.append(forecast.predict(spec(2000).requests()))
        forecast.reserve(spec(2000).requests())
    ahead_s = [one.ahead_s for one in predicted if one is not None]
    own_s = ahead_s[2]
    assert own_s > 0.0 and ahead_s == [0.0, 0.0, own_s, own_s]
