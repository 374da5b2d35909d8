"""Sessions in simulations: a closed loop over one replica and over several, and keys for the prefix cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medha.core.batch import Arrived, Batch, Chunk, Completed, Event, FinishReason, Output, TokenOut
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.planning.candidate import PlanCandidate, evaluate_candidate, isolated_bound
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary_table import summary_table
from megatron_medha.workload.session_mix import SessionsConfig
from megatron_medha.workload.workload import Workload, WorkloadConfig

SHAPE = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 21,
)  # fmt: skip
A100 = Hardware(name="a100", flops_per_s=3.12e14, memory_bytes_per_s=2.039e12, num_devices=16, devices_per_node=8)
ENGINE = EngineCosts(
    name="test", step_s=1.5e-3, stage_entry_s=0.0, sequence_s=5e-6, layer_launch_s=1e-4, request_s=5e-3
)
SETUP = SchedulerSetup(
    config=SchedulerConfig(), shape=SHAPE, hardware=A100, layout=ParallelLayout(tp=4), num_blocks=1 << 14,
    block_size=16, engine=ENGINE, learns=False, kv=KVConfig(),
)  # fmt: skip
SESSIONS = WorkloadConfig(sessions=SessionsConfig(num_sessions=6, turns=5.0, length_scale=0.05, start_s=5.0))


class SeenKeys:
    """An observer of the keys that outputs have filled."""

    def __init__(self) -> None:
        self.filled: dict[str, bytes] = {}

    def handled(self, event: Event, outputs: list[Output], now_s: float) -> None:
        """See Observer."""
        if isinstance(event, Completed):
            for request_id, keys in event.filled_keys:
                self.filled[request_id] = self.filled.get(request_id, b"") + keys

    def scheduled(self, batch: object, now_s: float) -> None:
        """See Observer."""


def run(dp: int = 1, workload: WorkloadConfig = SESSIONS, **more: object) -> tuple[list[RequestStats], SeenKeys]:
    found: list[RequestStats] = []
    seen = SeenKeys()
    observers = (seen,) if dp == 1 else ()
    config = SimulationConfig(setup=SETUP, dp=dp, workload=workload, **more)
    Simulation(config).run(SimulationHooks(on_outcome=found.append, observers=observers))
    return found, seen


@pytest.mark.parametrize("dp", [1, 3])
def test_every_turn_runs_once_and_its_gap_after_the_one_before(dp: int) -> None:
    found, _ = run(dp)
    by_id = {one.request.request_id: one for one in found}
    sessions = Workload(SESSIONS, 0).sessions
    assert sorted(by_id) == sorted(turn.request_id for one in sessions for turn in one.turns)
    for session in sessions:
        children = [one for one in sessions if one.parent == session.name]
        for index, turn in enumerate(session.turns):
            ran = by_id[turn.request_id]
            assert ran.ending is Ending.FINISHED and ran.request.session_id == session.name
            if index:
                awaited = [session.turns[index - 1]]
                awaited += [one.turns[-1] for one in children if one.parent_turn == index - 1]
                ended_s = max(by_id[one.request_id].last_token_s or 0.0 for one in awaited)
                assert ran.request.arrival_s == pytest.approx(ended_s + turn.gap_s)


def test_outputs_fill_granules_with_the_keys_of_the_next_prompt() -> None:
    found, seen = run()
    by_id = {one.request.request_id: one.request for one in found}
    assert seen.filled
    for request_id, keys in seen.filled.items():
        name, _, index = request_id.rpartition(".")
        following = by_id.get(f"{name}.{int(index) + 1}")
        if following is not None:
            assert following.prefix_keys.startswith(by_id[request_id].prefix_keys + keys)


def test_without_a_prefix_cache_requests_have_no_keys() -> None:
    config = SimulationConfig(setup=replace(SETUP, kv=KVConfig(prefix_cache=False)), workload=SESSIONS)
    found: list[RequestStats] = []
    Simulation(config).run(SimulationHooks(on_outcome=found.append))
    assert {one.request.prefix_keys for one in found} == {b""}


def test_the_end_of_the_time_in_which_turns_come_is_kept() -> None:
    found, _ = run(workload=replace(SESSIONS, duration_s=8.0))
    assert found and max(one.request.arrival_s for one in found) < 8.0


@pytest.mark.parametrize("dp", [1, 2])
def test_what_is_repeated_is_not_computed_again_and_every_token_is(dp: int) -> None:
    # There is memory for all. What is new is computed, and up to a granule of each turn; the system prompt is new once.
    found, _ = run(dp)
    whole = sum(one.request.num_prompt_tokens for one in found)
    cached = sum(one.num_cached_tokens or 0 for one in found)
    new = sum(turn.num_new_tokens for one in Workload(SESSIONS, 0).sessions for turn in one.turns)
    assert whole - new - 16 * len(found) <= cached <= whole - new + 5 * 800
    config = SimulationConfig(setup=SETUP, dp=dp, workload=SESSIONS)
    machine = Simulation(config).run(SimulationHooks()).values["machine"]
    num_out = sum(one.num_tokens_out - 1 for one in found)
    assert machine["num_tokens_computed"] == whole - cached + num_out


def test_a_session_stays_on_the_replica_that_has_its_prefix() -> None:
    found, _ = run(4)
    later = [one for one in found if not one.request.request_id.endswith(".0")]
    num_found = sum((one.num_cached_tokens or 0) > 0.5 * one.request.num_prompt_tokens for one in later)
    assert num_found >= 0.95 * len(later)


@pytest.mark.parametrize(("cached", "least"), [(True, 0.5), (False, 0.0)])
def test_a_plan_counts_hits_where_prompts_begin_alike(cached: bool, least: float) -> None:
    setup = replace(SETUP, kv=KVConfig(prefix_cache=cached))
    trial = PlanCandidate(name="lars", config=SimulationConfig(setup=setup, workload=SESSIONS, slo=Slo(ttft_s=60.0)))
    assert (isolated_bound(trial) is None) == cached  # a prompt that is cached in part may be faster than alone
    verdict = evaluate_candidate(trial)
    assert verdict.passes and verdict.hit_rate is not None
    assert verdict.hit_rate > least if cached else verdict.hit_rate == 0.0


class HalfCached:
    """A system that finds all but the last token of every other prompt cached, and nothing of the rest."""

    def __init__(self) -> None:
        self._waiting: list[Request] = []
        self._running: dict[int, Request] = {}
        self._num_batches = 0

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See SchedulerProtocol."""
        match event:
            case Arrived(request):
                self._waiting.append(request)
            case Completed(batch_id=batch_id):
                return [TokenOut(self._running.pop(batch_id).request_id, batch_id, FinishReason.LENGTH)]
            case _:
                pass
        return []

    def schedule(self, now_s: float) -> Batch | None:
        """See SchedulerProtocol."""
        if not self._waiting or self._running:
            return None
        request, number = self._waiting.pop(0), self._num_batches
        self._num_batches += 1
        start = 0 if number % 2 else request.num_prompt_tokens - 1
        self._running[number] = request
        chunk = Chunk(request.request_id, start, request.num_prompt_tokens - start, True)
        return Batch(number, (chunk,), (), now_s, 1.0, 1.0)


def test_what_a_first_chunk_does_not_compute_was_cached(tmp_path: Path) -> None:
    path = tmp_path / "four.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "0,1001,1\n" * 4)
    found: list[RequestStats] = []
    simulation = Simulation(SimulationConfig(setup=SETUP, workload=WorkloadConfig(path=path)))
    values = simulation.run(SimulationHooks(on_outcome=found.append), HalfCached()).values
    assert [one.num_cached_tokens for one in found] == [1000, 0, 1000, 0]
    assert all(one.first_scheduled_s is not None for one in found)
    assert values["all"]["num_cached_tokens"] == 2000 and values["all"]["hit_rate"] == pytest.approx(2000 / 4004)
    assert values["machine"]["num_tokens_computed"] == 2 + 2 * 1001
    assert "prompt tokens cached" in summary_table(values)


def test_without_hits_nothing_is_said_of_them() -> None:
    simulation = Simulation(SimulationConfig(setup=replace(SETUP, kv=KVConfig(prefix_cache=False)), workload=SESSIONS))
    values = simulation.run(SimulationHooks()).values
    assert values["all"]["hit_rate"] == 0.0 and "cached" not in summary_table(values)
