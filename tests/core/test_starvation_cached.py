"""With the prefix cache too every request has its first token within the bound that docs/scheduling.md states.

Work is then that of what was not cached: of what was at arrival, or of less if some of it was evicted since.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from test_starvation import BUDGET_S, COST, SHAPE

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Batch, Output, TokenOut
from megatron_medha.core.kv.block_pool import num_blocks_for
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import PrefillTimes
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

BLOCK, GRANULE = 4, 8
BURST_EVERY_S = 1000.0  # by then all of the burst before have ended, and only the cache has their KV


@dataclass
class Promise:
    """What was promised of a request when it had its first token, and when that was."""

    deadline_s: float
    num_cached_tokens: int
    first_token_s: float


class WatchedRuntime(RecordingSimRuntime):
    """Notes the promise of every request."""

    def __init__(self, requests: list[Request], spp: int) -> None:
        super().__init__(requests, true_step_s(COST), spp)
        self.scheduler: Scheduler | None = None
        self.promises: dict[str, Promise] = {}
        self.first_deadlines_s: dict[str, float] = {}  # by request: some move when what they count on is evicted

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        assert self.scheduler is not None
        for seq in self.scheduler.sequences:
            self.first_deadlines_s.setdefault(seq.request_id, seq.deadline_s)

    def emit(self, output: Output) -> None:
        super().emit(output)
        if isinstance(output, TokenOut) and output.request_id not in self.promises:
            assert self.scheduler is not None
            seq = self.scheduler.sequence(output.request_id)
            assert seq is not None, "there are two output tokens at least"
            self.promises[seq.request_id] = Promise(seq.deadline_s, seq.num_promised_tokens, self.now_s())


def keys_of(family: int, num_shared: int, name: str, num_tokens: int) -> bytes:
    """Of a prompt that begins with so many granules of a family's text, and goes on with its own."""
    texts = [f"{family}" if place < num_shared else name for place in range(num_tokens // GRANULE)]
    return b"".join(f"{text}.{place}".encode().ljust(16) for place, text in enumerate(texts))


# So long that a tile at the end of a prompt still keeps the budget: the bound is that of steps which do.
DRAWN = st.lists(
    st.tuples(
        st.integers(0, 2),                                     # burst
        st.integers(0, 1),                                     # family of prompts that begin alike
        st.one_of(st.integers(0, 20), st.integers(0, 100)),    # granules of its text
        st.one_of(st.integers(1, 150), st.integers(1, 400)),   # tokens of its own
        st.integers(2, 4),                                     # output tokens
        st.floats(0.0, 4.0),                                   # arrival in the burst
        st.integers(0, 2),                                     # priority class
        st.one_of(st.none(), st.floats(0.05, 5.0)),            # a deadline of its own
    ),
    min_size=10,
    max_size=40,
)


@given(
    drawn=DRAWN,
    policy=st.sampled_from(sorted(POLICIES)),
    share=st.floats(0.1, 0.9),
    has_space_sharing=st.booleans(),
    has_triage=st.booleans(),
    spp=st.sampled_from((1, 2)),
    eviction=st.sampled_from(("value", "lru")),
)
@settings(max_examples=60, deadline=None)
def test_every_request_of_random_bursts_that_begin_alike_has_its_first_token_within_the_bound(
    drawn: list[tuple[int, int, int, int, int, float, int, float | None]],
    policy: str,
    share: float,
    has_space_sharing: bool,
    has_triage: bool,
    spp: int,
    eviction: str,
) -> None:
    config = SchedulerConfig(
        policy=policy, step_budget_s=BUDGET_S, progress_share=share, has_space_sharing=has_space_sharing,
        has_triage=has_triage, min_deadline_s=0.05, watermark=0.0,
    )  # fmt: skip
    requests, num_blocks = [], [0, 0, 0]
    for index, (burst, family, num_shared, num_own, num_out, at_s, level, slo_s) in enumerate(drawn):
        num_tokens, name = num_shared * GRANULE + num_own, f"r{index}"
        num_blocks[burst] += num_blocks_for(num_tokens + num_out, BLOCK)
        requests.append(Request(
            request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out,
            arrival_s=burst * BURST_EVERY_S + at_s, priority=level, ttft_slo_s=slo_s,
            prefix_keys=keys_of(family, num_shared, name, num_tokens),
        ))  # fmt: skip
    # A burst fits, so that nobody waits for memory, and what others have left in the cache is evicted.
    memory = KVMemory(
        num_blocks=max(num_blocks), block_size=BLOCK, max_context_len=SHAPE.max_context_len, watermark=0.0,
        kv=KVConfig(granule_tokens=GRANULE, eviction=eviction),
    )  # fmt: skip
    world = WatchedRuntime(requests, spp)
    world.scheduler = Scheduler(config, COST, memory, spp)
    serve(world.scheduler, world)
    halves = PrefillTimes(config.chunk_rule, COST, BUDGET_S / 2, SHAPE.max_context_len)
    for burst in range(3):
        of_burst = [one for one in requests if one.arrival_s // BURST_EVERY_S == burst]
        for request in of_burst:
            promise = world.promises[request.request_id]
            # Its own, and that of those whose deadlines are, or once were, before its own.
            works_s = [
                uncached_s(halves, one.num_prompt_tokens, world.promises[one.request_id].num_cached_tokens)
                for one in of_burst if world.first_deadlines_s[one.request_id] <= promise.deadline_s
            ]  # fmt: skip
            most_s = (sum(works_s) + BUDGET_S / 2) / share + (len(works_s) + 1) * BUDGET_S
            assert promise.first_token_s <= promise.deadline_s + most_s


def uncached_s(times: PrefillTimes, num_tokens: int, num_cached_tokens: int) -> float:
    """Seconds of a prefill alone behind what is cached, as in scheduling/deadlines.py."""
    behind_s = times.prefill_s(num_tokens) - times.prefill_s(num_cached_tokens)
    return max(behind_s, times.prefill_s(num_tokens - num_cached_tokens))
