"""Measures the scheduler's own time per step, handle and schedule together, under 100, 1,000 and 10,000 live requests.

The real Scheduler with OnlineCost is driven by the simulated world in a closed loop: each request that ends is
replaced by a new one, so the number of live requests stays the same and the machine is always overloaded. Virtual
time makes runs identical, so each is done several times and every step counts with its least CPU time: what other
programs on the same cores add is not the scheduler's.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_medha.core.batch import Arrived, Batch, Event, Output, Rejected, TokenOut
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware, RooflineCost
from megatron_medha.core.memory import KVMemory
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.online_cost import OnlineCost
from megatron_medha.core.request import Request
from megatron_medha.core.scheduler import Scheduler
from megatron_medha.engine.loop import serve
from megatron_medha.sim.world import RequestRecord, SimulatedWorld, true_step_s

BARS_S = {1_000: 100e-6, 10_000: 1e-3}

LLAMA3_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
H100 = Hardware(name="h100", flops_per_s=989e12, memory_bytes_per_s=3.35e12)
# What the world really does: the scheduler has to find out.
TRUE_H100 = Hardware(
    name="h100, measured", flops_per_s=989e12, memory_bytes_per_s=3.35e12, linear_efficiency=0.55,
    attention_efficiency=0.4, memory_efficiency=0.7, step_overhead_s=4e-3,
)  # fmt: skip
NOISE = 0.03
WARM_UP_STEPS = 1_000


def prompts(seed: int) -> Iterator[Request]:
    """Chats of 20 to 8,000 tokens, and one document of 32K to 1M in twenty; about the shape of WORKLOADS.md's mix."""
    draw = random.Random(seed)
    index = 0
    while True:
        is_long = draw.random() < 0.01
        low, high = (32_000, 1_000_000) if is_long else (20, 8_000)
        yield Request(
            request_id=f"request-{index}",
            num_prompt_tokens=int(low * (high / low) ** draw.random()),
            max_output_tokens=draw.randint(2, 60),
            arrival_s=0.0,
        )
        index += 1


class ClosedWorld(SimulatedWorld):
    """A world in which a new request arrives whenever one ends, until `num_batches` have been submitted."""

    def __init__(self, num_live: int, num_batches: int, seed: int) -> None:
        self._prompts = prompts(seed)
        self._num_batches_left = num_batches
        noise = random.Random(seed)
        truth = true_step_s(RooflineCost(shape=LLAMA3_8B, hardware=TRUE_H100))
        first = [next(self._prompts) for _ in range(num_live)]
        super().__init__(first, lambda batch: truth(batch) * (1.0 + noise.gauss(0.0, NOISE)))

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        super().submit(batch)
        self._num_batches_left -= 1

    def next_event(self) -> Event | None:
        """See Runtime."""
        return super().next_event() if self._num_batches_left > 0 else None

    def emit(self, output: Output) -> None:
        """See Runtime."""
        if isinstance(output, Rejected) or isinstance(output, TokenOut) and output.finish_reason is not None:
            del self.records[output.request_id]
            request = next(self._prompts)
            now_s = self.now_s()
            request = Request(
                request_id=request.request_id,
                num_prompt_tokens=request.num_prompt_tokens,
                max_output_tokens=request.max_output_tokens,
                arrival_s=now_s,
            )
            self.records[request.request_id] = RequestRecord(request)
            self.push(now_s, Arrived(request))


@dataclass(slots=True)
class TimedDecisions:
    """The scheduler, with the seconds each step took: its own events and the schedule call."""

    scheduler: Scheduler
    pending_s: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    nums_decodes: list[int] = field(default_factory=list)
    nums_prefills: list[int] = field(default_factory=list)
    nums_live: list[int] = field(default_factory=list)

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See Decisions."""
        began_s = time.thread_time()
        outputs = self.scheduler.handle(event, now_s)
        self.pending_s += time.thread_time() - began_s
        return outputs

    def schedule(self, now_s: float) -> Batch | None:
        """See Decisions."""
        began_s = time.thread_time()
        batch = self.scheduler.schedule(now_s)
        self.pending_s += time.thread_time() - began_s
        if batch is not None:
            self.step_seconds.append(self.pending_s)
            self.pending_s = 0.0
            num_decodes = sum(chunk.num_tokens == 1 for chunk in batch.chunks)
            self.nums_decodes.append(num_decodes)
            self.nums_prefills.append(len(batch.chunks) - num_decodes)
            self.nums_live.append(self.scheduler.num_sequences)
        return batch


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one run."""

    num_live: float
    p50_s: float
    p99_s: float
    max_s: float
    mean_decodes: float
    mean_prefills: float
    num_owners: int
    slope_s: float  # extra time per extra decode, least squares over the steps


def run(num_live: int, max_num_sequences: int, num_steps: int, policy: str, seed: int) -> TimedDecisions:
    """Drive a new scheduler for so many steps."""
    config = SchedulerConfig(policy=policy, max_num_sequences=max_num_sequences)
    memory = KVMemory(num_blocks=400_000, block_size=16, max_context_len=LLAMA3_8B.max_context_len)
    scheduler = Scheduler(config, OnlineCost(RooflineCost(shape=LLAMA3_8B, hardware=H100)), memory)
    decisions = TimedDecisions(scheduler)
    gc.collect()
    serve(decisions, ClosedWorld(num_live, num_steps, seed))
    return decisions


def measure(
    num_live: int, max_num_sequences: int, num_steps: int, policy: str, num_repeats: int, seed: int = 0
) -> Measured:
    """Run until steady, then for `num_steps` steps; all of it `num_repeats` times."""
    runs = [run(num_live, max_num_sequences, WARM_UP_STEPS + num_steps, policy, seed) for _ in range(num_repeats)]
    steps = [min(seconds) for seconds in zip(*(run.step_seconds for run in runs), strict=True)][WARM_UP_STEPS:]
    decodes, prefills, lives = (
        numbers[WARM_UP_STEPS:] for numbers in (runs[0].nums_decodes, runs[0].nums_prefills, runs[0].nums_live)
    )
    mean_decodes = sum(decodes) / num_steps
    mean_s = sum(steps) / num_steps
    spread = sum((num - mean_decodes) ** 2 for num in decodes)
    slope_s = sum((num - mean_decodes) * (s - mean_s) for num, s in zip(decodes, steps, strict=True)) / (spread or 1)
    ordered = sorted(steps)
    return Measured(
        num_live=sum(lives) / num_steps,
        p50_s=ordered[num_steps // 2],
        p99_s=ordered[int(num_steps * 0.99)],
        max_s=ordered[-1],
        mean_decodes=mean_decodes,
        mean_prefills=sum(prefills) / num_steps,
        num_owners=runs[0].scheduler.memory.num_owners,
        slope_s=slope_s,
    )


def main() -> None:
    """Print one line per number of live requests, figure beside bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--sequences", type=int, default=40, help="that own KV at the same time")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policy", default="lars")
    arguments = parser.parse_args()
    print(f"python {sys.version.split()[0]}, policy {arguments.policy}, {arguments.steps} steps after 1,000 to warm up")
    print("  live  owners  decodes/step  prefills/step   p50 us   p99 us   max us   bar us  us per decode")
    for num_live in arguments.live:
        figures = measure(num_live, arguments.sequences, arguments.steps, arguments.policy, arguments.repeats)
        bar = f"{BARS_S[num_live] * 1e6:8.0f}" if num_live in BARS_S else "       -"
        print(
            f"{figures.num_live:6.0f}  {figures.num_owners:6d}  {figures.mean_decodes:12.1f}  "
            f"{figures.mean_prefills:13.2f} {figures.p50_s * 1e6:8.1f} {figures.p99_s * 1e6:8.1f} "
            f"{figures.max_s * 1e6:8.0f} {bar}  {figures.slope_s * 1e6:8.2f}"
        )


if __name__ == "__main__":
    main()
