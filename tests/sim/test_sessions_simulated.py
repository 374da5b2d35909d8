"""Sessions in simulations: a closed loop over one replica and over several, and keys for the prefix cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_medha.core.batch import Completed, Event, Output
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.stats.request_stats import Ending, RequestStats
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
