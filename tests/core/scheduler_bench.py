"""A scheduler whose world is moved by hand, event by event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_medha.core.batch import Arrived, Batch, Completed, Output
from megatron_medha.core.cost.step_cost import CostModel, Hardware, RooflineCost
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=100_000,
)  # fmt: skip
# A token costs about 0.25 ms, so a step of 50 ms holds some 190 of them.
HARDWARE = Hardware(name="slow", flops_per_s=1e9, memory_bytes_per_s=1e10, step_overhead_s=2e-3)
COST = RooflineCost(shape=SHAPE, hardware=HARDWARE)


def request(name: str, num_tokens: int = 8, num_out: int = 4, at_s: float = 0.0, **more: Any) -> Request:
    return Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=at_s, **more)


class Bench:
    """A scheduler whose world is moved by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 1000,
        kvp: int = 1,
        shard_tokens: int | None = None,
        spp: int = 1,
        cost: CostModel = COST,
        kv: KVConfig = NO_PREFIX_CACHE,
        **config: Any,
    ) -> None:
        self.memory = KVMemory(
            num_blocks=num_blocks,
            block_size=4,
            max_context_len=100_000,
            kvp=kvp,
            max_tokens_per_shard=shard_tokens,
            watermark=0.0,
            kv=kv,
        )
        self.scheduler = Scheduler(SchedulerConfig(**config), cost, self.memory, spp)
        self.now_s = 0.0

    def handle(self, event: Any) -> list[Output]:
        return self.scheduler.handle(event, self.now_s)

    def arrive(self, *requests: Request) -> None:
        for one in requests:
            assert self.handle(Arrived(one)) == []

    def schedule(self) -> Batch:
        batch = self.scheduler.schedule(self.now_s)
        assert batch is not None
        return batch

    def complete(self, batch: Batch, **more: Any) -> list[Output]:
        self.now_s += batch.predicted_s
        return self.handle(Completed(batch_id=batch.batch_id, duration_s=batch.predicted_s, **more))

    def step(self, **more: Any) -> tuple[Batch, list[Output]]:
        batch = self.schedule()
        return batch, self.complete(batch, **more)

    def run(self) -> list[Output]:
        outputs: list[Output] = []
        while (batch := self.scheduler.schedule(self.now_s)) is not None:
            outputs.extend(self.complete(batch))
        return outputs

    def run_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            self.step()

    def sequence(self, name: str) -> Sequence:
        (seq,) = (seq for seq in self.scheduler.sequences if seq.request_id == name)
        return seq

    def assert_empty(self) -> None:
        assert not list(self.scheduler.sequences) and self.scheduler.schedule(self.now_s) is None
        assert [pool.free_extents for pool in self.memory.pools] == [((0, self.memory.num_blocks),)] * self.memory.kvp
