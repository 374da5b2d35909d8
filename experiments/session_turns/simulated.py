"""Turns of eight sessions at half load on a simulated device: what of a wait is the load's, and what the scheduler's.

    python -m experiments.session_turns.simulated

As run.py, six times over: 20 turns up to 32K tokens. Steps take what a simple model of a two-core machine says, and the
scheduler knows that, so that nothing scatters. Answers of 444 tokens are the published ones unscaled: half load is then
mostly decodes, which run beside one another.

p50 and p99 of TTFT over the prefill of the new tokens alone; before: turns that met alternated, and were put behind
others once late. One device: the best of three orders, at each percentile. Bars: 1.2, 2.

    answers    before        now           one device    prefills are of the time
    16         1.27, 4.27    1.05, 3.23    1.00, 3.08    42%
    128        1.05, 3.41    1.04, 2.88    1.00, 2.70    30%
    444        1.04, 2.07    1.04, 2.07    1.00, 1.96    14%
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

from experiments.lib.recording_runtime import RecordingSimRuntime, RequestRecord, true_step_s
from experiments.session_turns.best_order import ORDERS, Job, response_times_s
from megatron_medha.core.batch import Arrived, Batch, Completed, Output, TokenOut
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.stats.summary import percentile

NUM_TURNS, NEW_TOKENS, SEEDS = 20, 1638, 6
GRANULE, KEY_BYTES = 64, 16
LOAD = 0.5


@dataclass(frozen=True, slots=True)
class SimpleCost:
    """Seconds of a step: so much each, and for each token, sequence, and pair of query and key."""

    revision: int = 0

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        return 1.5e-3 + 5.3e-5 * num_tokens + 2e-4 * num_sequences

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        return 1.74e-8 * num_tokens * (start + num_tokens / 2)

    def decode_attention_s(self, context: int) -> float:
        """See CostModel."""
        return 2.5e-8 * context

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """It knows."""


@dataclass
class Played:
    """Turns of sessions, in a world in which each comes some time after the one before has ended."""

    num_sessions: int
    num_outputs: int
    gap_s: float
    seed: int
    records: dict[str, RequestRecord] = field(init=False)
    _keys: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        names = range(self.num_sessions)
        num_granules = (NUM_TURNS * NEW_TOKENS + self.num_outputs) // GRANULE + 1
        self._keys = [Random(f"text {name}").randbytes(KEY_BYTES * num_granules) for name in names]
        cost = SimpleCost()
        memory = KVMemory(num_blocks=100_000, block_size=16, max_context_len=1 << 17, kv=KVConfig())
        world = _World(self, [self.turn(name, 0, name * self.gap_s / self.num_sessions) for name in names])
        serve(Scheduler(SchedulerConfig(), cost, memory), world)
        self.records = world.records

    def turn(self, session: int, number: int, arrival_s: float) -> Request:
        """One of them."""
        num_tokens = (number + 1) * NEW_TOKENS
        keys = self._keys[session][: num_tokens // GRANULE * KEY_BYTES]
        return Request(
            request_id=f"{session}-{number}", num_prompt_tokens=num_tokens, max_output_tokens=self.num_outputs,
            arrival_s=arrival_s, prefix_keys=keys, session_id=f"session {session}",
        )  # fmt: skip

    def key(self, session: int, granule: int) -> bytes:
        """Of a session's text."""
        return self._keys[session][granule * KEY_BYTES : (granule + 1) * KEY_BYTES]


class _World(RecordingSimRuntime):
    def __init__(self, played: Played, first: list[Request]) -> None:
        super().__init__(first, true_step_s(SimpleCost()))
        self._played = played
        self._gaps = [Random(f"gaps {played.seed} {session}") for session in range(played.num_sessions)]

    def completed(self, batch: Batch, duration_s: float) -> Completed:
        filled = []
        for chunk in batch.chunks:
            end = chunk.start + chunk.num_tokens + 1  # with the token that is sampled
            if chunk.samples_token and end % GRANULE == 0:
                session = int(chunk.request_id.split("-")[0])
                filled.append((chunk.request_id, self._played.key(session, end // GRANULE - 1)))
        return Completed(batch.batch_id, duration_s, filled_keys=tuple(filled))

    def emit(self, output: Output) -> None:
        super().emit(output)
        if not isinstance(output, TokenOut) or output.finish_reason is None:
            return
        session, number = map(int, output.request_id.split("-"))
        if number + 1 < NUM_TURNS:
            arrival_s = self.now_s() + self._gaps[session].uniform(0.5, 1.5) * self._played.gap_s
            request = self._played.turn(session, number + 1, arrival_s)
            self.records[request.request_id] = RequestRecord(request)
            self.push(arrival_s, Arrived(request))


def alone_s(record: RequestRecord, prefill_s: Callable[[int], float]) -> float:
    """The prefill of its new tokens, those after the answer before, alone."""
    num_tokens, num_outputs = record.request.num_prompt_tokens, record.request.max_output_tokens
    num_known = num_tokens - NEW_TOKENS
    return prefill_s(num_tokens) - prefill_s(num_known + num_outputs if num_known else 0)


def main() -> None:
    """Print ours beside one device that goes through the same prefills by some order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, nargs="*", default=[16, 128, 444], help="tokens of an answer")
    arguments = parser.parse_args()
    memory = KVMemory(num_blocks=100_000, block_size=16, max_context_len=1 << 17)
    prefill_s = Scheduler(SchedulerConfig(), SimpleCost(), memory).predicted_prefill_s
    print("TTFT over the prefill of the new tokens alone, at half load")
    for num_outputs in arguments.outputs:
        single = Played(1, num_outputs, 0.0, 0).records.values()
        service_s = fmean(record.token_times_s[-1] - record.request.arrival_s for record in single)
        ratios: dict[str, list[float]] = {"ours": [], **{order: [] for order in ORDERS}}
        busy: list[float] = []
        for seed in range(SEEDS):
            gap_s = (8 / LOAD - 1.0) * service_s
            records = [*Played(8, num_outputs, gap_s, seed).records.values()]
            jobs = [Job(record.request.arrival_s, alone_s(record, prefill_s)) for record in records]
            busy.append(sum(job.alone_s for job in jobs) / max(record.token_times_s[-1] for record in records))
            times_s = {name: response_times_s(jobs, order) for name, order in ORDERS.items()}
            times_s["ours"] = [record.ttft_s for record in records]
            for name, values in times_s.items():
                ratios[name] += [
                    value / job.alone_s
                    for value, job, record in zip(values, jobs, records, strict=True)
                    if not record.request.request_id.endswith("-0")
                ]
        print(f"answers of {num_outputs}; prefills alone are {fmean(busy):.0%} of the time")
        for name, values in ratios.items():
            title = name if name == "ours" else f"one device, {name}"
            print(f"  {title:38} p50 {percentile(sorted(values), 50):.2f}, p99 {percentile(sorted(values), 99):.2f}")


if __name__ == "__main__":
    main()
