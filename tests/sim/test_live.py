"""The simulated replica in wall time: the same engine, a world without a model."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence

import pytest

from megatron_medha.core.batch import Batch, Completed, FinishReason, FirstStageDone
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import Delivery, EnginePhase, ErrorDelivery, TokenDelivery
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.request_states import RequestStates
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.live import LiveRuntime, live_engine
from megatron_medha.sim.pipeline import Pipeline, StepTimes

WAIT_S = 120.0  # for what comes at once unless the machine is busy
SHAPE = ModelShape(
    name="sim", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=100, max_context_len=4096,
)
FAST = Hardware(
    name="fast", flops_per_s=1e15, memory_bytes_per_s=1e13, step_overhead_s=1e-4, layer_overhead_s=0.0, num_devices=8
)
ONE_RANK = ParallelLayout()
FAST_ENGINE = EngineCosts(
    name="fast", step_s=1e-4, sequence_s=0.0, stage_entry_s=0.0, layer_launch_s=0.0, request_s=0.0
)


def run(num_outputs: int, layout: ParallelLayout = ONE_RANK, **sampling: object) -> list[Delivery]:
    setup = SchedulerSetup(
        config=SchedulerConfig(), shape=SHAPE, hardware=FAST, engine=FAST_ENGINE, layout=layout, num_blocks=100,
        block_size=16,
    )  # fmt: skip
    engine = live_engine(setup=setup)
    got: list[Delivery] = []
    has_ended, is_ready = threading.Event(), threading.Event()

    def take(deliveries: Sequence[Delivery]) -> None:
        got.extend(deliveries)
        if isinstance(got[-1], ErrorDelivery) or got[-1].finish_reason is not None:
            has_ended.set()

    def look() -> None:
        if engine.status.phase is EnginePhase.LOADING:
            threading.Timer(0.01, look).start()
        else:
            is_ready.set()

    engine.start(take)
    look()
    assert is_ready.wait(WAIT_S)
    request = Request(
        request_id="r", num_prompt_tokens=3, max_output_tokens=num_outputs, arrival_s=engine.now_s()
    )
    engine.submit(request, array("i", [1, 2, 97]), Sampling(max_output_tokens=num_outputs, **sampling))
    assert has_ended.wait(WAIT_S)
    engine.stop(WAIT_S)
    assert engine.status.phase is EnginePhase.STOPPED
    return got


def test_tokens_count_up_from_the_prompt_and_wrap_at_the_vocabulary() -> None:
    got = run(4)
    assert [d.token_id for d in got if isinstance(d, TokenDelivery)] == [98, 99, 0, 1]
    assert got[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("layout", [ParallelLayout(tp=2, spp=2), ParallelLayout(spp=2, kvp=2)])
def test_a_replica_of_many_ranks_gives_the_tokens_of_one(layout: ParallelLayout) -> None:
    got = run(4, layout)
    assert [d.token_id for d in got if isinstance(d, TokenDelivery)] == [98, 99, 0, 1]


def test_the_next_batch_enters_when_the_first_stage_is_free_not_when_the_last_one_is() -> None:
    streams = RequestStates(lambda deliveries: None)
    # The second stage takes so long that this test can be put aside in between.
    runtime = LiveRuntime(Inbox(), streams, lambda batch: StepTimes(((0.01, 0.5),)), Pipeline(2), vocab_size=100)
    assert runtime.has_room()
    runtime.submit(empty_batch(0))
    assert not runtime.has_room()
    assert runtime.next_event() == FirstStageDone(0) and runtime.has_room()
    runtime.submit(empty_batch(1))
    rest = [runtime.next_event() for _ in range(3)]
    assert rest == [FirstStageDone(1), Completed(batch_id=0, duration_s=0.51), Completed(batch_id=1, duration_s=0.51)]


def empty_batch(batch_id: int) -> Batch:
    return Batch(batch_id=batch_id, chunks=(), released=(), created_s=0.0, budget_s=0.05, predicted_s=0.03)


def test_a_stop_token_ends_a_simulated_request() -> None:
    got = run(50, stop_token_ids=(99,))
    assert [d.token_id for d in got if isinstance(d, TokenDelivery)] == [98, 99]
    assert got[-1].finish_reason is FinishReason.STOP


def test_a_request_that_never_fits_is_refused() -> None:
    (refusal,) = run(2000)
    assert isinstance(refusal, ErrorDelivery) and refusal.is_client_fault
