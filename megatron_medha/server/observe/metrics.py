"""All metrics of the server: what is counted and measured, and under which names it is shown.

HTTP requests are counted on the event loop, the scheduler's side on the engines' threads under the request log's lock;
no number is written by both.
Plain integers, because a token costs one of these updates per histogram and prometheus_client's own
take a lock and a walk over all buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from megatron_medha.core.kv.age_counts import AGES_S
from megatron_medha.core.ports import EnginePhase, ReplicaState
from megatron_medha.server.generation import Choice, GenerationSpec

# vLLM's boundaries; the first ones with more between 10 and 640 s, where million-token prompts are.
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    15.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0, 160.0, 240.0, 320.0, 480.0, 640.0, 2560.0,
)
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
RELATIVE_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
RATIOS = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0)
NUM_TOKENS = tuple(float(base * 10**power) for power in range(8) for base in (1, 2, 5))
NUM_STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
RELATIVE_SLACKS = (-100.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
KVP_DEGREES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# Prompt tokens up to which a request is of a length class.
LENGTH_CLASSES = ((1_000, "1k"), (10_000, "10k"), (100_000, "100k"), (1_000_000, "1m"))
LONGEST_CLASS = "longer"
# Why an HTTP request ends before its response is complete. All are shown from the start: a rate needs the first 0.
CUT_OFF_REASONS = (
    "client_gone", "cancelled", "reader_stalled", "reader_too_slow", "request_timeout", "request_rejected",
    "server_stopping", "engine_failed", "internal_error",
)
LAGS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
NUM_RECENT_LAGS = 500  # of which the greatest is shown: 10 s
# With the time of each, for the dashboard's percentiles of the last minute.
NUM_RECENT_TTFTS = 4096
NUM_RECENT_GAPS = 8192
NUM_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)


class Named(NamedTuple):
    """How a metric is shown: as medha:NAME and, where the meaning is the same, under vLLM's names, old ones too."""

    name: str
    meaning: str
    vllm_names: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [f"medha:{self.name}", *(f"vllm:{name}" for name in self.vllm_names)]


def own(name: str, meaning: str) -> Named:
    """One that vLLM has not."""
    return Named(name, meaning)


def in_vllm(name: str, meaning: str, *older: str) -> Named:
    """One that vLLM calls the same. older: names that dashboards made for earlier versions of it ask for."""
    return Named(name, meaning, (name, *older))


class LabelledCounts(NamedTuple):
    """A counter with labels."""

    named: Named
    labels: tuple[str, ...]
    counts: Mapping[tuple[str, ...], int]  # by the labels' values


class Histogram:
    """Counts of values per bucket; a bucket holds values up to and including its bound."""

    __slots__ = ("bounds", "counts", "named", "total")

    def __init__(self, bounds: Sequence[float], named: Named) -> None:
        self.named = named
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Values that were counted elsewhere, in the same buckets."""
        for place, count in enumerate(counts):
            self.counts[place] += count
        self.total += total


def _histogram(bounds: Sequence[float], named: Named) -> Any:
    return field(default_factory=partial(Histogram, bounds, named))


def _count(named: Named) -> Any:
    return field(default=0, metadata={"named": named})


@dataclass(eq=False)
class Metrics:
    """All measurements of one server."""

    # on the event loop
    ttft_s: Histogram = _histogram(
        TTFT_S, in_vllm("time_to_first_token_seconds", "From the arrival of a request to its first token")
    )
    inter_token_s: Histogram = _histogram(TOKEN_S, in_vllm(
        "inter_token_latency_seconds", "Between two tokens of a request", "time_per_output_token_seconds",
    ))
    time_per_output_token_s: Histogram = _histogram(
        TOKEN_S, in_vllm("request_time_per_output_token_seconds", "Mean time between the tokens of one request")
    )
    e2e_s: Histogram = _histogram(
        REQUEST_S, in_vllm("e2e_request_latency_seconds", "From the arrival of a request to its last token")
    )
    decode_s: Histogram = _histogram(
        REQUEST_S, in_vllm("request_decode_time_seconds", "From a request's first token to its last")
    )
    prompt_tokens: Histogram = _histogram(NUM_TOKENS, in_vllm("request_prompt_tokens", "Prompt tokens of a request"))
    output_tokens: Histogram = _histogram(
        NUM_TOKENS, in_vllm("request_generation_tokens", "Output tokens of a request")
    )
    params_n: Histogram = _histogram(NUM_CHOICES, in_vllm("request_params_n", "The n that clients ask for"))
    params_max_tokens: Histogram = _histogram(
        NUM_TOKENS, in_vllm("request_params_max_tokens", "Output tokens that a request may have")
    )
    loop_lag_s: Histogram = _histogram(LAGS_S, own(
        "event_loop_lag_seconds",
        "How late the API server's event loop runs what is due, as far as the server's own work explains it",
    ))
    recent_ttfts_s: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_TTFTS))
    recent_gaps_s: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_GAPS))
    recent_lags_s: deque[float] = field(default_factory=lambda: deque([0.0], maxlen=NUM_RECENT_LAGS))
    num_prompt_tokens: int = _count(
        in_vllm("prompt_tokens", "Prompt tokens computed or found in the prefix cache, also of aborted requests")
    )
    num_output_tokens: int = _count(in_vllm("generation_tokens", "Tokens generated"))
    num_ttft_slo_met: int = _count(own("ttft_slo_met", "Requests that met the TTFT target they brought"))
    num_ttft_slo_missed: int = _count(own("ttft_slo_missed", "Requests that missed the TTFT target they brought"))
    num_cut_off: Counter[str] = field(default_factory=Counter)
    num_ended: Counter[str] = field(default_factory=lambda: Counter(stop=0, length=0, abort=0, error=0))
    # on the engine's thread
    queue_s: Histogram = _histogram(
        REQUEST_S, in_vllm("request_queue_time_seconds", "From the arrival of a request to its first schedule")
    )
    prefill_s: Histogram = _histogram(
        REQUEST_S, in_vllm("request_prefill_time_seconds", "From a request's first schedule to its first token")
    )
    step_predicted_s: Histogram = _histogram(
        STEP_S, own("step_predicted_seconds", "Duration of a step as the scheduler predicted it")
    )
    step_actual_s: Histogram = _histogram(
        STEP_S, own("step_actual_seconds", "Duration of a step as the ranks measured it")
    )
    step_relative_error: Histogram = _histogram(
        RELATIVE_ERRORS, own("step_prediction_relative_error", "|predicted / actual - 1| of a step")
    )
    step_ratio: Histogram = _histogram(
        RATIOS, own("step_actual_over_predicted_ratio", "Actual / predicted duration of a step; above 1: too slow")
    )
    step_tokens: Histogram = _histogram(NUM_STEP_TOKENS, in_vllm("iteration_tokens_total", "Tokens of a step"))
    relative_slack: Histogram = _histogram(RELATIVE_SLACKS, own(
        "relative_slack_at_first_token",
        "What was left of a request's first-token deadline, in units of its own predicted prefill; below 0: missed",
    ))
    kvp_degree: Histogram = _histogram(
        KVP_DEGREES, own("kvp_degree", "KVP ranks that hold a request's KV when its first token comes")
    )
    reuse_gap_s: Histogram = _histogram(AGES_S, own(
        "prefix_reuse_gap_seconds", "Between the last use of a cached prefix and the request that begins with it",
    ))
    eviction_age_s: Histogram = _histogram(AGES_S, own(
        "prefix_eviction_age_seconds", "Since the last use of cached KV that was evicted, by granule",
    ))
    num_prefix_queries: int = _count(in_vllm("prefix_cache_queries", "Prompt tokens looked for in the prefix cache"))
    num_prefix_hits: int = _count(in_vllm("prefix_cache_hits", "Prompt tokens that were in the prefix cache"))
    saved_prefill_s: float = _count(
        own("prefix_cache_saved_seconds", "Predicted prefill time of the prompt tokens that were in the prefix cache")
    )
    num_cached_tokens: Counter[tuple[str, ...]] = field(default_factory=Counter)  # by length class and SLO class
    num_deadlines_met: Counter[tuple[str, ...]] = field(default_factory=Counter)  # by length class and SLO class
    num_deadlines_missed: Counter[tuple[str, ...]] = field(default_factory=Counter)
    num_preemptions: int = _count(in_vllm("num_preemptions", "Sequences that lost their KV to a decode"))
    num_preempted_tokens: int = _count(
        own("preempted_tokens", "Tokens that had to be recomputed because KV was lost")
    )
    num_recomputed_tokens: int = _count(
        own("recomputed_tokens", "Prompt and output tokens computed more than once")
    )
    num_paused_prefills: int = _count(
        own("prefill_pauses", "Prefills that waited for others at a chunk boundary, with KV kept")
    )
    num_overtaking_steps: int = _count(own("overtaking_steps", "Steps that overtook another, which was held"))
    held_s: float = _count(own("held_seconds", "Time in which steps were held while others overtook them"))
    stage_busy_s: float = _count(own("stage_busy_seconds", "Time the ranks computed, by the step and pipeline stage"))
    work_present_s: float = _count(own(
        "work_present_seconds", "Time in which there was work; 1 - stage_busy / work_present is the share of bubbles",
    ))
    num_rejected: int = _count(own("rejected_requests", "Requests refused by the scheduler"))

    @property
    def counters(self) -> dict[Named, float]:
        """Those without labels of their own."""
        return {one.metadata["named"]: getattr(self, one.name) for one in fields(self) if one.metadata}

    def labelled_counters(self, slo_classes: Iterable[str]) -> Iterator[LabelledCounts]:
        """Those with labels. slo_classes: all that a request may have, whether or not one has come."""
        keys = list(product([*(name for _, name in LENGTH_CLASSES), LONGEST_CLASS], slo_classes))
        lengths = ("length_class", "slo_class")
        yield LabelledCounts(
            in_vllm("request_success", "Requests that ended, by reason"), ("finished_reason",),
            with_zeros((), self.num_ended),
        )  # fmt: skip
        yield LabelledCounts(
            own("requests_cut_off", "HTTP requests that ended before their response was complete"), ("reason",),
            with_zeros(CUT_OFF_REASONS, self.num_cut_off),
        )  # fmt: skip
        yield LabelledCounts(
            own("deadlines_met", "Requests whose first token came in time"), lengths,
            {**dict.fromkeys(keys, 0), **self.num_deadlines_met.copy()},
        )  # fmt: skip
        yield LabelledCounts(
            own("cached_prompt_tokens", "Prompt tokens that were in the prefix cache"), lengths,
            {**dict.fromkeys(keys, 0), **self.num_cached_tokens.copy()},
        )  # fmt: skip
        yield LabelledCounts(
            own("deadlines_missed", "Requests whose first token came late"), lengths,
            {**dict.fromkeys(keys, 0), **self.num_deadlines_missed.copy()},
        )  # fmt: skip

    @property
    def histograms(self) -> list[Histogram]:
        """All of them."""
        return [value for value in vars(self).values() if isinstance(value, Histogram)]

    # requests, on the event loop

    def request_admitted(self, spec: GenerationSpec) -> None:
        """An HTTP request was admitted."""
        self.params_n.observe(spec.n)
        for prompt in spec.prompts:
            self.params_max_tokens.observe(prompt.max_output_tokens)

    def first_token(self, spec: GenerationSpec, at_s: float) -> None:
        """The first token of a choice reached the server."""
        ttft_s = at_s - spec.arrival_s
        self.ttft_s.observe(ttft_s)
        self.recent_ttfts_s.append((at_s, ttft_s))
        if spec.ttft_slo_s is not None:
            self.num_ttft_slo_met += ttft_s <= spec.ttft_slo_s
            self.num_ttft_slo_missed += ttft_s > spec.ttft_slo_s
        self.num_output_tokens += 0 if spec.discards_output else 1

    def next_token(self, gap_s: float, at_s: float) -> None:
        """A later token of a choice reached the server, that long after the one before."""
        self.inter_token_s.observe(gap_s)
        self.recent_gaps_s.append((at_s, gap_s))
        self.num_output_tokens += 1

    def choice_finished(self, spec: GenerationSpec, choice: Choice) -> None:
        """A choice is complete."""
        assert choice.first_token_s is not None and choice.last_token_s is not None
        assert choice.finish_reason is not None
        decode_s = choice.last_token_s - choice.first_token_s
        self.num_ended[choice.finish_reason] += 1
        self.prompt_tokens.observe(len(choice.prompt.token_ids))
        self.output_tokens.observe(choice.num_tokens)
        self.e2e_s.observe(choice.last_token_s - spec.arrival_s)
        self.decode_s.observe(decode_s)
        if choice.num_tokens > 1:
            self.time_per_output_token_s.observe(decode_s / (choice.num_tokens - 1))


def length_class(num_prompt_tokens: int) -> str:
    """The class of prompts about as long as this: named after its upper end."""
    return next((name for most, name in LENGTH_CLASSES if num_prompt_tokens <= most), LONGEST_CLASS)


def replica_gauges(replica: ReplicaState) -> dict[Named, float]:
    """What is the case on one replica now."""
    status, load = replica
    num_used = load.num_blocks - load.num_free_blocks
    return {
        own("is_ready", "1 while requests run; 0 while the model loads or ranks come up again"):
            float(status.phase is EnginePhase.READY),
        in_vllm("num_requests_running", "Requests in prefill or decode"): load.num_prefilling + load.num_decoding,
        in_vllm("num_requests_waiting", "Requests not begun"): load.num_waiting,
        in_vllm("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", "gpu_cache_usage_perc"):
            num_used / load.num_blocks if load.num_blocks else 0.0,
        own("num_waiting_tokens", "Prompt tokens not computed yet"): load.num_waiting_tokens,
        own("num_prefilling", "Requests in prefill"): load.num_prefilling,
        own("num_decoding", "Requests in decode"): load.num_decoding,
        own("num_free_blocks", "KV blocks that are free, or cached and used by nobody"): load.num_free_blocks,
        own("num_cached_blocks", "KV blocks with cached prefixes that nobody uses"): load.num_cached_blocks,
        own("num_blocks", "KV blocks"): load.num_blocks,
    }


def replica_counters(replica: ReplicaState) -> dict[Named, float]:
    """What has happened to one replica's ranks."""
    return {
        own("rank_failures", "Times that ranks were lost"): replica.status.num_failures,
        own("rank_recoveries", "Times that ranks that were lost came up again"): replica.status.num_recoveries,
    }


def with_zeros(reasons: Iterable[str], counts: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    """Counts by label, those that have never counted included."""
    return {(reason,): count for reason, count in {**dict.fromkeys(reasons, 0), **counts}.items()}
