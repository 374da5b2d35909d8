"""Several replicas behind the router in one simulated world: nothing is lost, and prompts share them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks, SimulationResult, StateSample
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.workload.workload import WorkloadConfig

SHAPE = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 21,
)  # fmt: skip
A100 = Hardware(name="a100", flops_per_s=3.12e14, memory_bytes_per_s=2.039e12, num_devices=16, devices_per_node=8)
ENGINE = EngineCosts(
    name="test", step_s=1.5e-3, stage_entry_s=0.0, sequence_s=5e-6, layer_launch_s=1e-4, request_s=5e-3
)
SETUP = SchedulerSetup(
    config=SchedulerConfig(), shape=SHAPE, hardware=A100, layout=ParallelLayout(tp=4), num_blocks=1 << 16,
    block_size=16, engine=ENGINE, learns=False,
)  # fmt: skip


def run(
    dp: int, workload: WorkloadConfig, **more: object
) -> tuple[SimulationResult, list[RequestStats], list[StateSample]]:
    outcomes: list[RequestStats] = []
    samples: list[StateSample] = []
    config = SimulationConfig(setup=SETUP, dp=dp, workload=workload, **more)
    result = Simulation(config).run(SimulationHooks(on_outcome=outcomes.append, on_sample=samples.append))
    return result, outcomes, samples


MIX = WorkloadConfig(qps=4.0, num_requests=60, long_share=0.1, long_prompt_scale=0.1, output_scale=0.05)


@pytest.mark.parametrize("dp", [1, 2, 5])
def test_every_request_of_the_workload_is_served_once_whatever_the_number_of_replicas(dp: int) -> None:
    result, outcomes, samples = run(dp, MIX)
    assert sorted(one.request.request_id for one in outcomes) == sorted(f"r{index}" for index in range(60))
    assert {one.ending for one in outcomes} == {Ending.FINISHED}
    machine = result.values["machine"]
    assert machine["num_gpus"] == 4 * dp and 0.0 < machine["utilisation"] <= 1.0
    assert machine["num_tokens_computed"] >= sum(one.request.num_prompt_tokens for one in outcomes)
    times = [sample.now_s for sample in samples]
    assert times == sorted(times) and len(times) > 10
    assert all(0.0 <= sample.kv_used_share <= 1.0 for sample in samples if sample.kv_used_share is not None)


def test_the_same_configuration_gives_the_same_run() -> None:
    assert run(3, MIX)[0].values == run(3, MIX)[0].values


def test_prompts_that_come_at_once_go_to_replicas_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,60000,2\n0,60000,2\n")
    both = WorkloadConfig(path=path)
    (_, outcomes, _), (_, alone, _) = run(2, both), run(1, replace(both, num_requests=1))
    (lone_s,) = [one.ttft_s for one in alone]
    assert [one.ttft_s for one in outcomes] == [lone_s, lone_s]
    assert max(one.ttft_s or 0.0 for one in run(1, both)[1]) > 1.5 * (lone_s or 0.0)


def test_more_replicas_never_make_prompts_that_fit_one_wait_longer() -> None:
    busy = replace(MIX, qps=30.0)
    mean_s = [sum(one.ttft_s or 0.0 for one in run(dp, busy)[1]) for dp in (1, 2, 4)]
    assert mean_s[0] > mean_s[1] > mean_s[2]


def test_a_run_that_is_cut_off_counts_what_every_replica_had_in_flight() -> None:
    result, outcomes, _ = run(2, replace(MIX, qps=200.0), max_drain_s=0.05)
    assert any(one.ending is Ending.UNFINISHED for one in outcomes) and len(outcomes) == 60
    assert 0.0 < result.values["machine"]["utilisation"] <= 1.0
