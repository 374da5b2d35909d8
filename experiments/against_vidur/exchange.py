"""What run.py hands to the other simulator's process, and gets back. Imports nothing that one environment lacks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.engine_costs import EngineCosts
from megatron_medha.core.hardware import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.engine.cached_cost import CachedClusterCost

# Rules of theirs that mended.py can replace.
RULES = {
    "deadline": "theirs sets EDF's deadline with the multiplier, then again without it",
    "queues": "theirs lets prefills that have begun go first, whatever their priority; newcomers get what is left",
    "slack": "theirs divides slack by the deadline, not by the request's own work",
    "answers": "theirs lets no long prefill into a step in which an answer to a long prompt is being decoded",
    "chunks": "theirs takes the first chunk within 10% of the budget, above or below, of 1,024 tokens at most",
    "stages": "theirs takes a step's time for its first stage's, times the number of stages",
    "work": "theirs tabulates prefill times by that search for chunks, of prompts rounded up to 256 tokens",
    "rest": "theirs leaves to nobody what a long prefill gives of its step and no other takes",
    "debts": "theirs gives the same share of the next step, however much of this one others have taken",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of vidur; pickled."""

    policy: str                  # fcfs_fixed_chunk, fcfs, edf, lrs or st
    mended: tuple[str, ...]      # rules of theirs that are replaced, by the names in mended.py
    shape: ModelShape
    hardware: Hardware
    engine: EngineCosts
    layout: ParallelLayout
    num_blocks: int
    block_size: int
    max_tokens: int              # of one request; theirs tabulates prefill times up to here
    requests: tuple[tuple[float, int, int], ...]  # arrival in seconds, prompt tokens, output tokens
    step_budget_s: float
    chunk_tokens: int            # of fcfs_fixed_chunk
    max_num_sequences: int
    max_batch_tokens: int        # of a mended chunk search
    deadline_multiplier: float
    min_deadline_s: float
    long_tokens: int             # of st: computed so far
    has_metrics: bool            # theirs collects and writes its metrics and trace, as it does by default
    scratch: str                 # a directory for whatever vidur writes

    def cost(self) -> CachedClusterCost:
        """Our cost model of the job's machine."""
        return CachedClusterCost(shape=self.shape, hardware=self.hardware, engine=self.engine, layout=self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came out; pickled."""

    ttft_s: tuple[float, ...]    # in order of arrival
    seconds: float               # CPU time of the run, without imports and without the table of prefill times
    cost_seconds: float          # of those, inside our cost model
    shipped_table_seconds: float  # CPU time of the table of prefill times without the shortcut of theirs.py, estimated
    num_batches: int
    num_restarts: int            # requests that lost their KV
