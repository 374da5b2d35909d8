"""The scheduler's own time per step, handle and schedule together, under 100, 1,000 and 10,000 live requests.

    medha compile && python -m experiments.decisions.run    # without the first: interpreted
    python -m experiments.decisions.run --keyed --live 10000 --segments 1000000 --repeats 2

The real Scheduler with OnlineCost is driven by the simulated world in a closed loop: each request that ends is
replaced by a new one, so the number of live requests stays the same and the machine is always overloaded. Prompts
are those of the mix with 5% long ones that the Medha paper is measured with; answers are short enough that about 35
requests decode in a step, so that prefills never rest: a request comes, starts, is co-scheduled and ends in about
every step.

--keyed: with a prefix cache, in which half of the prompts have their first 2,048 tokens, of 200 kinds. Memory is far
smaller than what all requests wait for, so prefixes are published and evicted in every step. --segments: so many are in
the cache before, of 512 tokens each, in chains of ten as the turns of sessions leave them; half of the prompts go on
from one of the chains.

Virtual time makes runs identical, so each is done several times and every step counts with its least CPU time: what
other programs on the same cores add is not the scheduler's. The speed of the machine is printed beside the figures.
The garbage collector's time is taken out of a step and printed apart: when it runs is decided by all that the process
allocates.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_medha.system.compiled_core import use_compiled_core

IS_COMPILED = use_compiled_core()

from experiments.lib.quantile import quantile
from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Arrived, Batch, Event, Output, TokenOut
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

BARS_S = {1_000: 100e-6, 10_000: 1e-3}
# Most output tokens of a request with which about 32 decode: the more wait, the more short ones LARS has to start.
OUTPUTS_FOR_32_DECODES = {100: 180, 1_000: 64, 10_000: 24}
WARM_UP_STEPS = 1_000
GRANULE, KEY_BYTES = 64, 16
STEM_TOKENS = 2_048
NUM_BLOCKS, BLOCK_TOKENS = 400_000, 16
CHAIN_SEGMENTS, SEGMENT_GRANULES = 10, 8
NOISE = 0.03

LLAMA3_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
H100 = Hardware(name="h100", flops_per_s=989e12, memory_bytes_per_s=3.35e12)
# What the world really does: the scheduler has to find out.
TRUE_H100 = replace(
    H100, linear_efficiency=0.55, attention_efficiency=0.4, memory_efficiency=0.7, step_overhead_s=4e-3
)


def prompts(seed: int, max_output_tokens: int, stems: Sequence[bytes] = ()) -> Iterator[Request]:
    """Chats of up to 8,000 tokens, and one document of 100K to 1M in twenty.

    stems: keys that half of the prompts begin with; () for prompts without keys.
    """
    draw = random.Random(seed)
    keys = random.Random(f"keys {seed}")
    index = 0
    while True:
        is_long = draw.random() < 0.05
        low, high = (100_000, 1_000_000) if is_long else (20, 8_000)
        request = Request(
            request_id=f"request-{index}",
            num_prompt_tokens=int(low * (high / low) ** draw.random()),
            max_output_tokens=draw.randint(2, max_output_tokens),
            arrival_s=0.0,
        )
        if stems:
            num_bytes = request.num_prompt_tokens // GRANULE * KEY_BYTES
            stem = keys.choice(stems) if keys.random() < 0.5 else b""
            request = replace(request, prefix_keys=(stem + keys.randbytes(num_bytes))[:num_bytes])
        yield request
        index += 1


def short_stems(seed: int) -> list[bytes]:
    """Keys of 200 texts of 2,048 tokens."""
    draw = random.Random(f"stems {seed}")
    return [draw.randbytes(STEM_TOKENS // GRANULE * KEY_BYTES) for _ in range(200)]


def fill(memory: KVMemory, num_segments: int, seed: int) -> list[bytes]:
    """Put chains of segments into the cache; the keys of the chains."""
    assert memory.cache is not None
    index, pool, draw = memory.cache.index, memory.pools[0], random.Random(f"chains {seed}")
    chains: list[bytes] = []
    for number in range(num_segments):
        if number % CHAIN_SEGMENTS == 0:
            chains.append(b"")
        chains[-1] += draw.randbytes(SEGMENT_GRANULES * KEY_BYTES)
        keys, name, now_s = chains[-1], f"cached-{number}", (number - num_segments) * 1e-3
        match = index.match(keys, 0, len(keys) // KEY_BYTES, 0)
        holding = index.take(name, match, now_s, f"session-{len(chains)}")
        table = index.extents(holding.deepest)
        own = pool.allocate(SEGMENT_GRANULES * GRANULE // BLOCK_TOKENS)
        assert own is not None
        table += own
        index.publish(holding, keys, len(keys) // KEY_BYTES, table, now_s)
        index.release(holding, table, now_s)
        index.settle(name)
    return chains


class ClosedWorld(RecordingSimRuntime):
    """A world in which a new request arrives whenever one ends, until `num_batches` have been submitted."""

    def __init__(
        self, num_live: int, num_batches: int, max_output_tokens: int, seed: int, stems: Sequence[bytes]
    ) -> None:
        self._prompts = prompts(seed, max_output_tokens, stems)
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
        if isinstance(output, TokenOut) and output.finish_reason is not None:
            self.push(self.now_s(), Arrived(replace(next(self._prompts), arrival_s=self.now_s())))


@dataclass(slots=True)
class CollectorClock:
    """CPU seconds that Python's garbage collector has taken, as one of gc.callbacks."""

    total_s: float = 0.0
    _began_s: float = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """The collector starts or stops."""
        if phase == "start":
            self._began_s = time.thread_time()
        else:
            self.total_s += time.thread_time() - self._began_s


@dataclass(frozen=True, slots=True)
class Step:
    """What one batch has cost the scheduler, and what was in it."""

    decision_s: float  # its predecessor's completion, and its own making
    arrivals_s: float  # requests that arrived between the two
    num_arrivals: int
    num_decodes: int
    num_prefills: int
    num_live: int
    collector_s: float  # of the garbage collector, in none of the two


@dataclass(slots=True)
class TimedDecisions:
    """The scheduler with a stop watch."""

    scheduler: Scheduler
    collector: CollectorClock = field(default_factory=CollectorClock)
    steps: list[Step] = field(default_factory=list)
    _decision_s: float = 0.0
    _collector_s: float = 0.0
    _arrivals_s: float = 0.0
    _num_arrivals: int = 0

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See Decisions."""
        began_s, before_s = time.thread_time(), self.collector.total_s
        outputs = self.scheduler.handle(event, now_s)
        seconds = self._without_collector(time.thread_time() - began_s, before_s)
        if isinstance(event, Arrived):
            self._arrivals_s += seconds
            self._num_arrivals += 1
        else:
            self._decision_s += seconds
        return outputs

    def schedule(self, now_s: float) -> Batch | None:
        """See Decisions."""
        began_s, before_s = time.thread_time(), self.collector.total_s
        batch = self.scheduler.schedule(now_s)
        self._decision_s += self._without_collector(time.thread_time() - began_s, before_s)
        if batch is not None:
            num_decodes = sum(chunk.num_tokens == 1 for chunk in batch.chunks)
            self.steps.append(
                Step(
                    self._decision_s,
                    self._arrivals_s,
                    self._num_arrivals,
                    num_decodes,
                    len(batch.chunks) - num_decodes,
                    self.scheduler.num_sequences,
                    self._collector_s,
                )
            )
            self._decision_s = self._arrivals_s = self._collector_s = 0.0
            self._num_arrivals = 0
        return batch

    def _without_collector(self, seconds: float, before_s: float) -> float:
        collector_s = self.collector.total_s - before_s
        self._collector_s += collector_s
        return seconds - collector_s


def run(
    num_live: int,
    max_output_tokens: int,
    num_steps: int,
    config: SchedulerConfig,
    seed: int = 0,
    is_keyed: bool = False,
    num_segments: int = 0,
) -> list[Step]:
    """Drive a new scheduler for so many steps after it has become steady."""
    kv = KVConfig() if is_keyed else NO_PREFIX_CACHE
    num_blocks = NUM_BLOCKS + num_segments * SEGMENT_GRANULES * GRANULE // BLOCK_TOKENS
    memory = KVMemory(num_blocks, BLOCK_TOKENS, LLAMA3_8B.max_context_len, kv=kv)
    cost = OnlineCost(RooflineCost(shape=LLAMA3_8B, hardware=H100))
    decisions = TimedDecisions(Scheduler(config, cost, memory))
    stems = fill(memory, num_segments, seed) if num_segments else short_stems(seed) if is_keyed else []
    gc.collect()
    gc.callbacks.append(decisions.collector)
    serve(decisions, ClosedWorld(num_live, WARM_UP_STEPS + num_steps, max_output_tokens, seed, stems))
    gc.callbacks.remove(decisions.collector)
    return decisions.steps[WARM_UP_STEPS:]


def run_often(
    num_live: int,
    max_output_tokens: int,
    num_steps: int,
    config: SchedulerConfig,
    num_repeats: int,
    is_keyed: bool = False,
    num_segments: int = 0,
) -> list[Step]:
    """The same steps several times; of each the least times."""
    runs = [
        run(num_live, max_output_tokens, num_steps, config, is_keyed=is_keyed, num_segments=num_segments)
        for _ in range(num_repeats)
    ]
    return [
        replace(
            same[0],
            decision_s=min(step.decision_s for step in same),
            arrivals_s=min(step.arrivals_s for step in same),
            collector_s=min(step.collector_s for step in same),
        )
        for same in zip(*runs, strict=True)
    ]


def slope_per_decode_s(num_repeats: int) -> float:
    """Seconds that one more decode adds to a step of nothing but decodes."""

    def step_s(num_decodes: int) -> float:
        memory = KVMemory(num_blocks=400_000, block_size=16, max_context_len=LLAMA3_8B.max_context_len)
        cost = OnlineCost(RooflineCost(shape=LLAMA3_8B, hardware=H100))
        requests = [
            Request(request_id=f"request-{index}", num_prompt_tokens=50, max_output_tokens=10_000, arrival_s=0.0)
            for index in range(num_decodes)
        ]
        world = RecordingSimRuntime(requests, lambda batch: 0.02)
        decisions = TimedDecisions(Scheduler(SchedulerConfig(), cost, memory))
        world.push(6.0, None)  # type: ignore[arg-type]  # ends the world
        serve(decisions, world)
        return quantile([step.decision_s for step in decisions.steps[100:]], 0.5)

    return min((step_s(192) - step_s(64)) / 128 for _ in range(num_repeats))


def loop_s() -> float:
    """Seconds for a million rounds of an empty loop: how fast this Python is on this machine, at the moment."""

    def once() -> float:
        began_s = time.thread_time()
        for _ in range(1_000_000):
            pass
        return time.thread_time() - began_s

    return min(once() for _ in range(9))


def main() -> None:
    """Print one line per number of live requests, figure beside bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--outputs", type=int, help="most output tokens of a request; more means more decodes")
    parser.add_argument("--sequences", type=int, default=256, help="that own KV at the same time")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policy", default="lars")
    parser.add_argument("--keyed", action="store_true", help="with a prefix cache; half of the prompts share stems")
    parser.add_argument("--segments", type=int, default=0, help="cached before the first request; with --keyed")
    arguments = parser.parse_args()
    config = SchedulerConfig(policy=arguments.policy, max_num_sequences=arguments.sequences)
    kind = "compiled" if IS_COMPILED else "interpreted"
    print(
        f"python {sys.version.split()[0]}, {kind}, {loop_s() * 1e3:.1f} ms for a million empty loops; "
        f"policy {arguments.policy}, {arguments.steps} steps, CPU microseconds"
    )
    print("                per step           | one decision |  with arrivals |       | collector, apart")
    print("  live  decodes  prefills arrivals |   p50    p99 |    p50     p99 |   bar |   mean      most")
    for num_live in arguments.live:
        outputs = arguments.outputs or OUTPUTS_FOR_32_DECODES.get(num_live, 64)
        steps = run_often(
            num_live, outputs, arguments.steps, config, arguments.repeats, arguments.keyed, arguments.segments
        )
        decisions = [step.decision_s * 1e6 for step in steps]
        everything = [(step.decision_s + step.arrivals_s) * 1e6 for step in steps]
        collector = [step.collector_s * 1e6 for step in steps]
        bar = f"{BARS_S[num_live] * 1e6:5.0f}" if num_live in BARS_S else "    -"
        print(
            f"{sum(step.num_live for step in steps) / len(steps):6.0f} "
            f"{sum(step.num_decodes for step in steps) / len(steps):8.1f} "
            f"{sum(step.num_prefills for step in steps) / len(steps):9.2f} "
            f"{sum(step.num_arrivals for step in steps) / len(steps):8.2f} | "
            f"{quantile(decisions, 0.5):5.0f} {quantile(decisions, 0.99):6.0f} | "
            f"{quantile(everything, 0.5):6.0f} {quantile(everything, 0.99):7.0f} | {bar} | "
            f"{sum(collector) / len(steps):6.0f} {max(collector):9.0f}"
        )
    print(f"one more decode in a step: {slope_per_decode_s(arguments.repeats) * 1e6:.2f} us")


if __name__ == "__main__":
    main()
