"""Whole simulations: identities between what is measured, equal results for equal seeds, files that hold together."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.planning.candidate import PlanCandidate, at_rate, evaluate_candidate
from megatron_medha.sim.run_directory import RecordConfig, RunDirectory
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks, StateSample
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.decision_log import read_log, replay
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary_table import summary_table
from megatron_medha.workload.arrivals import ArrivalProcess
from megatron_medha.workload.workload import WorkloadConfig

SHAPE = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 21,
)  # fmt: skip
A100 = Hardware(
    name="a100", flops_per_s=3.12e14, memory_bytes_per_s=2.039e12, num_sms=108, num_devices=16, devices_per_node=8
)
ENGINE = EngineCosts(
    name="test", step_s=1.5e-3, stage_entry_s=0.0, sequence_s=5e-6, layer_launch_s=1e-4, request_s=5e-3
)

STANDARD = RecordConfig(trace_start_s=0.0)


def config(
    spp: int = 2, kvp: int = 1, qps: float = 2.0, num_requests: int = 30, long_share: float = 0.05, **more: object
) -> SimulationConfig:
    setup = SchedulerSetup(
        config=SchedulerConfig(),
        shape=SHAPE,
        hardware=A100,
        layout=ParallelLayout(tp=8 // kvp, spp=spp, kvp=kvp),
        num_blocks=1 << 16 if kvp > 1 else 1 << 19,
        block_size=16,
        max_tokens_per_shard=1 << 17 if kvp > 1 else None,
        engine=ENGINE,
        learns=bool(more.pop("learns", False)),
    )
    # The paper's mix with long prompts a fifth as long and answers of a few tokens: quick, but the same mix.
    workload = WorkloadConfig(
        long_share=long_share, long_prompt_scale=0.2, output_scale=0.025, qps=qps, num_requests=num_requests
    )
    return SimulationConfig(setup=setup, workload=workload, **more)


def outcomes(given: SimulationConfig) -> list[RequestStats]:
    found: list[RequestStats] = []
    Simulation(given).run(SimulationHooks(on_outcome=found.append))
    return found


def record(given: SimulationConfig, path: Path, wanted: RecordConfig = STANDARD) -> Path:
    directory = RunDirectory.create(path, "some: config\n", given.seed)
    simulation = Simulation(given)
    with directory.recording(given, wanted, simulation.workload.facts.last_arrival_s) as watchers:
        result = simulation.run(watchers)
    directory.finish(result.values, "table\n")
    return path


@pytest.mark.parametrize(("spp", "kvp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_time_in_the_system_is_waiting_execution_and_preemption(spp: int, kvp: int) -> None:
    found = outcomes(config(spp, kvp, long_share=0.2))
    assert len(found) == 30 and all(one.ending is Ending.FINISHED for one in found)
    for one in found:
        assert one.num_tokens_out == one.request.max_output_tokens
        assert one.preempted_s is not None and one.preempted_s >= -1e-9
        assert one.scheduling_delay_s is not None and one.scheduling_delay_s >= ENGINE.request_s - 1e-12
        assert one.slowdown is not None and one.slowdown >= 0.99


def test_a_request_alone_takes_as_long_as_a_request_alone() -> None:
    for one in outcomes(config(qps=1e-3, num_requests=5, long_share=0.4)):
        assert one.slowdown == pytest.approx(1.0, abs=0.03)  # between simulated lengths T_iso is interpolated
        assert one.preempted_s == pytest.approx(0.0, abs=1e-6)


def test_the_same_seed_gives_the_same_files_to_the_byte(tmp_path: Path) -> None:
    given = config(truth=TruthConfig(noise=0.1), seed=7)
    wanted = RecordConfig(decision_log=True, trace_start_s=0.0)
    first, second = (record(given, tmp_path / name, wanted) for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert {"requests.jsonl", "samples.jsonl", "summary.json", "trace.json", "decisions.jsonl"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_seed_gives_other_results() -> None:
    assert [one.ttft_s for one in outcomes(config(seed=1))] != [one.ttft_s for one in outcomes(config(seed=2))]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    given = config()
    record(given, tmp_path / "run", RecordConfig(decision_log=True, trace_start_s=0.0))
    lines = (tmp_path / "run" / "requests.jsonl").read_text().splitlines()
    watched = [json.loads(line)["ttft_s"] for line in lines]
    assert watched == [round(one.ttft_s or 0.0, 6) for one in outcomes(given)]


def test_a_run_directory_is_json_throughout_and_adds_up(tmp_path: Path) -> None:
    run = record(config(long_share=0.2), tmp_path / "run")
    requests = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["all"]["num_requests"] == len(requests) == 30
    met = sum(one["meets_slo"] for one in requests)
    assert summary["all"]["attainment"] == pytest.approx(met / 30)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [one["num_ended"] for one in samples] == sorted(one["num_ended"] for one in samples)
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["tid"] for span in spans} == {0, 1}
    for stage in (0, 1):  # a stage runs one batch at a time
        lane = sorted((span["ts"], span["dur"]) for span in spans if span["tid"] == stage)
        assert all(a + b <= c + 0.01 for (a, b), (c, _) in zip(lane, lane[1:]))


def test_the_trace_shows_on_every_kvp_rank_what_that_rank_computed(tmp_path: Path) -> None:
    wanted = RecordConfig(decision_log=True, trace_start_s=0.0)
    run = record(config(kvp=2, long_share=0.3), tmp_path / "run", wanted)
    recorded: dict[int, dict[int, set[str]]] = {}
    for line in (run / "decisions.jsonl").read_text().splitlines():
        for request_id, _, count, _, ranks in json.loads(line).get("batch", {"chunks": ()})["chunks"]:
            for rank in ranks if count > 1 else ():
                by_rank = recorded.setdefault(json.loads(line)["batch"]["batch_id"], {})
                by_rank.setdefault(rank, set()).add(request_id)
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    shown = [event for event in events if event["ph"] == "X" and event["args"]["chunks"]]
    assert {event["pid"] for event in shown} == {0, 1}
    for event in shown:
        names = {chunk["request"] for chunk in event["args"]["chunks"] if chunk["tokens"] > 1}
        assert names == recorded.get(event["args"]["batch"], {}).get(event["pid"], set())


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not empty; name another"):
        RunDirectory.create(tmp_path, "", 0)


@pytest.mark.parametrize("learns", [False, True])
def test_the_decisions_of_a_simulation_replay(tmp_path: Path, learns: bool) -> None:
    run = record(config(num_requests=8, learns=learns), tmp_path / "run", RecordConfig(decision_log=True))
    with (run / "decisions.jsonl").open() as stream:
        header, records = read_log(stream)
        assert replay(records, SchedulerSetup.from_header(header).build()) > 100


def test_a_biased_truth_takes_longer_than_believed() -> None:
    exact, all_of_it, attention, linear = (
        Simulation(config(long_share=0.5, truth=TruthConfig(linear_bias=a, attention_bias=b))).isolated_s
        for a, b in ((1.0, 1.0), (1.5, 1.5), (1.0, 1.5), (1.5, 1.0))
    )
    # Only the front's own share is not biased: chunks stay as large, as no decode waits for these steps.
    assert 1.49 < all_of_it(100_000) / exact(100_000) <= 1.5
    assert attention(100_000) > 1.02 * exact(100_000) and linear(100_000) > 1.02 * exact(100_000)
    assert attention(500) < 1.05 * exact(500) < linear(500)


def test_noise_is_drawn_from_the_seed_and_is_no_bias() -> None:
    quiet, noisy = (
        Simulation(config(truth=TruthConfig(noise=noise))).run(SimulationHooks()).values["classes"]["short"]["tpot_s"]["p50"]
        for noise in (0.0, 0.2)
    )
    assert noisy != quiet and noisy == pytest.approx(quiet, rel=0.1)


def test_a_run_may_end_before_everybody_has_finished() -> None:
    found = outcomes(config(qps=50.0, long_share=0.5, max_drain_s=0.5))
    unfinished = [one for one in found if one.ending is Ending.UNFINISHED]
    assert len(found) == 30 and unfinished
    assert not any(Slo().is_met(one) for one in unfinished)


def test_a_table_says_how_many_are_not_in_its_latencies() -> None:
    cut = Simulation(config(qps=50.0, long_share=0.5, max_drain_s=0.5)).run(SimulationHooks()).values
    num_without = sum(one.first_token_s is None for one in outcomes(config(qps=50.0, long_share=0.5, max_drain_s=0.5)))
    assert num_without and f"{num_without} requests have no first token" in summary_table(cut)
    assert "no first token" not in summary_table(Simulation(config(num_requests=3)).run(SimulationHooks()).values)


def test_a_request_that_no_machine_of_this_size_can_hold_is_refused_before_the_run() -> None:
    given = config()
    small = replace(given, setup=replace(given.setup, num_blocks=100))
    with pytest.raises(ConfigError, match="this machine has KV memory for requests of up to 1,600"):
        Simulation(small)


def test_utilisation_and_memory_are_shares() -> None:
    machine = Simulation(config(long_share=0.2)).run(SimulationHooks()).values["machine"]
    for key in ("utilisation", "active_share", "bubbles", "mfu", "mbu", "kv_used_mean", "kv_used_max"):
        assert 0.0 < machine[key] < 1.0, key


def test_utilisation_of_a_run_that_is_cut_off_in_the_middle_of_its_work_counts_that_work() -> None:
    machine = Simulation(config(qps=50.0, long_share=0.5, max_drain_s=0.5)).run(SimulationHooks()).values["machine"]
    assert 0.0 <= machine["bubbles"] < 1.0 and 0.5 < machine["active_share"] <= 1.0


def test_a_stage_is_never_busy_for_more_than_all_of_the_time_wherever_a_run_is_cut_off() -> None:
    # One batch of seconds is in flight at the cut.
    whole = SchedulerConfig(policy="fcfs", chunking=Chunking.WHOLE, max_batch_tokens=1 << 20)
    given = config(spp=1, qps=50.0, long_share=0.5, max_drain_s=0.5)
    given = replace(given, setup=replace(given.setup, config=whole))
    machine = Simulation(given).run(SimulationHooks()).values["machine"]
    assert 0.5 < max(machine["utilisation_by_stage"]) <= 1.0 + 1e-9 and machine["bubbles"] == pytest.approx(0.0)


def test_memory_does_not_grow_with_the_length_of_a_run(tmp_path: Path) -> None:
    # All requests are equal, so that what is remembered of steps is complete after a few of them.
    path = tmp_path / "equal.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "100,5\n" * 600)

    def peak_bytes(num_requests: int) -> int:
        given = config(spp=1)
        workload = WorkloadConfig(path=path, qps=2.0, num_requests=num_requests, arrivals=ArrivalProcess.CONSTANT)
        simulation = Simulation(replace(given, workload=workload, sample_s=1e6))
        tracemalloc.start()
        simulation.run(SimulationHooks())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    # Eight doubles a request are kept for percentiles; a request that is not forgotten would be a kilobyte or more.
    assert peak_bytes(600) - peak_bytes(200) < 400 * 300


def test_samples_show_slack_falling_while_a_request_waits() -> None:
    samples: list[StateSample] = []
    given = config(qps=20.0, long_share=0.3, sample_s=0.05)
    Simulation(given).run(SimulationHooks(on_sample=samples.append))
    waits = [one for sample in samples for one in sample.waiting]
    assert any(not one.is_started for one in waits)
    by_request: dict[str, list[float]] = {}
    for one in waits:
        if not one.is_started:
            by_request.setdefault(one.request_id, []).append(one.relative_slack)
    assert all(slacks == sorted(slacks, reverse=True) for slacks in by_request.values())


@pytest.fixture
def trial() -> Callable[..., PlanCandidate]:
    def run(qps: float) -> PlanCandidate:
        return at_rate(PlanCandidate(name="lars", config=replace(config(long_share=0.0, num_requests=40), dp=2)), qps)

    return run


def test_a_trial_passes_under_little_load_and_ends_early_under_too_much(trial: Callable[..., PlanCandidate]) -> None:
    light, heavy = evaluate_candidate(trial(1.0)), evaluate_candidate(trial(400.0))
    assert light.passes and light.attainment is not None and light.attainment >= 0.9
    assert not heavy.passes and heavy.attainment is None and "had missed the SLO after" in heavy.why


def test_replicas_share_the_requests_of_one_workload(trial: Callable[..., PlanCandidate]) -> None:
    workload = trial(6.0).config.workload
    assert (workload.qps, workload.num_requests, trial(6.0).num_gpus) == (6.0, 120, 32)
    assert trial(1.0).config.workload.num_requests == 40, "no fewer where they come slower"


def test_prompts_alone_are_simulated_once_for_all_loads_and_numbers_of_replicas() -> None:
    one = config(num_requests=20)
    faster = replace(one, dp=2, workload=replace(one.workload, qps=7.0))
    assert Simulation(faster).isolated_s is Simulation(one).isolated_s
    assert Simulation(replace(one, truth=TruthConfig(linear_bias=1.5))).isolated_s is not Simulation(one).isolated_s
