"""Run as a script: a digest of every batch and output of random walks, and whether the scheduler was compiled."""

from __future__ import annotations

import hashlib
import random

from megatron_medha.system.compiled_core import use_compiled_core

use_compiled_core()

from experiments.lib.recording_runtime import RecordingSimRuntime, random_result
from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling import scheduler
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

NUM_WALKS = 150
SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=400,
)  # fmt: skip
SLOW = Hardware(
    name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4, layer_overhead_s=2e-5
)


class Digest:
    """An observer that remembers all it receives, in 32 bytes."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def handled(self, event: Event, outputs: list[Output], now_s: float) -> None:
        self._sum.update(f"{now_s!r} {event!r} {outputs!r}".encode())

    def scheduled(self, batch: Batch, now_s: float) -> None:
        self._sum.update(f"{now_s!r} {batch!r}".encode())

    def __str__(self) -> str:
        return self._sum.hexdigest()


def walk(seed: int, digest: Digest) -> None:
    """Requests of all lengths under a random configuration; some fail, stop, are aborted, or lose their ranks."""
    draw = random.Random(seed)
    kvp, num_blocks = draw.choice((1, 1, 2, 3)), draw.randint(4, 24)
    config = SchedulerConfig(
        policy=draw.choice(sorted(POLICIES)), is_preemptive=draw.random() < 0.7, chunking=draw.choice(list(Chunking)),
        step_budget_s=draw.choice((1e-4, 2e-3, 0.05, 1.0)), tile_tokens=draw.choice((1, 4)),
        max_batch_tokens=draw.choice((12, 400)), fixed_chunk_tokens=16, max_num_sequences=draw.randint(1, 12),
        min_deadline_s=draw.choice((1e-3, 0.5)), progress_share=draw.choice((0, 0.1)), max_skips=draw.choice((0, 10)),
        watermark=draw.choice((0.0, 0.1)),
    )  # fmt: skip
    requests = [
        Request(
            request_id=f"r{i}", num_prompt_tokens=draw.randint(0, 120), max_output_tokens=draw.randint(1, 12),
            arrival_s=draw.random() * 0.3, ttft_slo_s=draw.choice((None, 0.005, 10)),
            tpot_slo_s=draw.choice((None, None, 0.001)), priority=draw.choice((0, 0, 1)),
        )
        for i in range(draw.randint(1, 18))
    ]  # fmt: skip
    roofline = RooflineCost(shape=SHAPE, hardware=SLOW)
    shard_tokens = None if kvp == 1 else 4 * draw.randint(1, num_blocks)
    memory = KVMemory(num_blocks, 4, 400, kvp=kvp, max_tokens_per_shard=shard_tokens, watermark=config.watermark)
    spp = draw.randint(1, 3)

    world = RecordingSimRuntime(
        requests, lambda batch: batch.predicted_s * draw.uniform(0.5, 1.5), spp, random_result(draw)
    )
    world.abort(draw.random() * 0.3, f"r{draw.randint(0, 17)}")
    if draw.random() < 0.3:
        world.lose_ranks(draw.random() * 0.3)
    cost = OnlineCost(roofline) if draw.random() < 0.5 else roofline
    serve(scheduler.Scheduler(config, cost, memory, spp), world, (digest,))


if __name__ == "__main__":
    found = Digest()
    for number in range(NUM_WALKS):
        walk(number, found)
    print("interpreted" if scheduler.__file__.endswith(".py") else "compiled", found)
