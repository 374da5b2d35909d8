"""The real engine under scaled-down sessions, and what its decision log says of hits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from experiments.hit_rate.access_trace import AccessTrace
from experiments.hit_rate.figures import hit_figures
from experiments.lib.random_llama import SESSION_MODEL
from experiments.lib.session_bench import bench_sessions
from experiments.lib.simulations import session_words
from megatron_medha.workload.session_mix import SessionsConfig
from megatron_medha.workload.workload import Workload, WorkloadConfig

_BYTES_PER_VALUE = 4
KV_BYTES_PER_TOKEN = (
    2 * SESSION_MODEL["num_layers"] * SESSION_MODEL["num_kv_heads"] * SESSION_MODEL["head_dim"] * _BYTES_PER_VALUE
)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Sessions as long as a CPU can play in minutes; KV for a quarter of them."""

    num_sessions: int = 64
    turns: float = 12.0
    length_scale: float = 0.02
    gap_scale: float = 0.1

    def words(self, seed: int) -> list[str]:
        """As options of medha bench."""
        return [*session_words(**self._fields), f"seed={seed}"]

    @property
    def _fields(self) -> dict[str, Any]:
        return {**asdict(self), "start_s": 10.0}

    def num_kv_tokens(self, seed: int) -> int:
        """A quarter of the sessions times the mean prompt of a turn, at least the longest request."""
        facts = Workload(WorkloadConfig(sessions=SessionsConfig(**self._fields)), seed).facts
        mean = facts.num_prompt_tokens / facts.num_requests
        return max(round(0.25 * self.num_sessions * mean), facts.max_request_tokens + 128)


def run_engine(load: EngineLoad, eviction: str, seed: int, checkpoint: Path) -> dict[str, Any]:
    """One load on a server of its own; its figures, as those of a simulation."""
    gib = load.num_kv_tokens(seed) * KV_BYTES_PER_TOKEN / (1 << 30)
    ran = bench_sessions(
        checkpoint, [f"kv.eviction={eviction}", f"model.kv_memory_gib={gib:.6f}"], load.words(seed)
    )
    trace, setup, every = AccessTrace.of(ran.log.records), ran.log.setup, ran.summary["all"]
    granule_tokens = setup.kv.tokens_per_granule(setup.block_size)
    capacity = setup.num_blocks * setup.block_size // granule_tokens
    services_s = [row["e2e_s"] for row in ran.rows if row["e2e_s"] is not None]
    return {
        **hit_figures(trace, granule_tokens, capacity, setup, eviction),
        "client_hit_rate": ran.summary["sessions"]["hit_rate"],
        "num_turns": every["num_requests"],
        "num_finished": every["num_finished"],
        "kv_tokens": capacity * granule_tokens,
        "turn_p50_tokens": median(row["prompt_tokens"] for row in ran.rows),
        "service_p50_s": median(services_s),
        "service_mean_s": fmean(services_s),
        "ttft_s": every["ttft_s"],
        "num_preemptions": every["num_preemptions"],
    }

