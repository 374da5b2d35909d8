"""What another tenant has in the prefix cache changes no decision, whatever its prompts are."""

from __future__ import annotations

import io
import json
import random
from array import array

import pytest

from experiments.lib.recording_runtime import RecordingSimRuntime
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.prefix_keys import GranuleKeys, root_key
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.stats.decision_log import DecisionLog

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=4000,
)  # fmt: skip
GRANULE = 8


def batches(root_of_alice: bytes, num_blocks: int, seed: int) -> tuple[list[dict], dict[str, int]]:
    """The decisions of a run in which Bob sends what Alice has sent, and what of Bob's prompts was cached."""
    draw = random.Random(seed)
    setup = SchedulerSetup(
        config=SchedulerConfig(step_budget_s=0.005, tile_tokens=8, max_num_sequences=8),
        shape=SHAPE, hardware=Hardware(name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4),
        layout=ParallelLayout(), num_blocks=num_blocks, block_size=4, kv=KVConfig(granule_tokens=GRANULE),
    )  # fmt: skip
    requests = []
    for index in range(30):
        length = draw.randrange(5, 300)
        for name, root in (("alice", root_of_alice), ("bob", root_key(b"secret", "bob"))):
            prompt = array("i", range(length))
            requests.append(Request(
                request_id=f"{name}-{index}", num_prompt_tokens=length, max_output_tokens=draw.randint(1, 20),
                arrival_s=0.1 * index + (0.03 if name == "bob" else 0.0),
                prefix_keys=GranuleKeys(root, GRANULE).extend(prompt), session_id=draw.choice(["", name]),
            ))  # fmt: skip
    world = RecordingSimRuntime(requests, lambda batch: batch.predicted_s, 1)
    stream = io.StringIO()
    scheduler, num_cached = setup.build(), {}

    class Hits:
        def handled(self, event: object, outputs: list, now_s: float) -> None:
            for output in outputs:
                if output.request_id.startswith("bob") and getattr(output, "num_cached_tokens", 0):
                    num_cached[output.request_id] = output.num_cached_tokens

        def scheduled(self, batch: object, now_s: float) -> None:
            pass

    serve(scheduler, world, (DecisionLog(stream, setup.header()), Hits()))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if "batch" in line], num_cached


@pytest.mark.parametrize("num_blocks", [200, 1000])  # with evictions and without
@pytest.mark.parametrize("seed", range(3))
def test_another_keys_cached_prefix_changes_neither_batches_nor_cached_tokens(num_blocks: int, seed: int) -> None:
    one, other, none = root_key(b"secret", "alice"), root_key(b"secret", "another"), root_key(b"secret", "bob")
    assert batches(one, num_blocks, seed) == batches(other, num_blocks, seed)
    shared, num_cached = batches(none, num_blocks, seed)  # Alice is Bob: it is no test without hits
    assert sum(num_cached.values()) > sum(batches(one, num_blocks, seed)[1].values()) > 0
