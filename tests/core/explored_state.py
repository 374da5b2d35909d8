"""What an exploration walks over: a few scripted requests, the scheduler they go through, and its state."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_medha.core.batch import Batch
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.kv.eviction import ClassedOrder, EvictionRules
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.batch_committer import SubmittedBatch
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.kinetic_tournament import KineticTournament
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

BLOCK = 2  # tokens of a block, and of a granule
TTL_S = 1e3  # of sessions: more than all steps take, less than LATE_S
LATE_S = 1e6  # by so much the clock goes ahead when all deadlines pass


class ConstantCost:
    """Every token takes as long as any other, a step itself next to nothing: waiting for a sibling is worth it."""

    revision = 0

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        return 0.1 + 1.0 * num_tokens

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        return 0.0

    def decode_attention_s(self, context: int) -> float:
        """See CostModel."""
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """See CostModel."""


@dataclass(frozen=True, slots=True)
class Script:
    """A request: its prompt and its output as one letter a granule, and its lengths in tokens."""

    text: str
    num_prompt: int
    num_output: int
    session: str = ""
    ends_session: bool = False

    def keys(self, first: int, last: int) -> bytes:
        """Of its granules [first, last): a key is all the text up to its end."""
        return b"".join(self.text[: granule + 1].encode().ljust(16, b".") for granule in range(first, last))

    def request(self, name: str, arrival_s: float) -> Request:
        """The request."""
        return Request(
            request_id=name, num_prompt_tokens=self.num_prompt, max_output_tokens=self.num_output, arrival_s=arrival_s,
            prefix_keys=self.keys(0, self.num_prompt // BLOCK), session_id=self.session,
            ends_session=self.ends_session,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is explored."""

    scripts: dict[str, Script]
    num_aborts: int = 1
    num_failures: int = 1
    num_losses: int = 1
    num_late: int = 1     # times that the clock passes all deadlines, and the time that sessions are kept
    num_blocks: int = 3   # of each of two ranks
    shard_tokens: int = 4
    spp: int = 2
    eviction: str = "lru"
    interruptible: bool = False

    def scheduler(self) -> Scheduler:
        """One without requests."""
        config = SchedulerConfig(
            chunking=Chunking.FIXED, fixed_chunk_tokens=4, tile_tokens=1, max_batch_tokens=8, max_num_sequences=4,
            min_deadline_s=1e5, watermark=0.0, interruptible=self.interruptible,
        )  # fmt: skip
        memory = KVMemory(
            num_blocks=self.num_blocks, block_size=BLOCK, max_context_len=100, kvp=2,
            max_tokens_per_shard=self.shard_tokens, watermark=0.0,
            kv=KVConfig(granule_tokens=BLOCK, eviction=self.eviction, session_ttl_s=TTL_S),
        )  # fmt: skip
        scheduler = Scheduler(config, ConstantCost(), memory, self.spp)
        scheduler._overtaking._rest_s = long_rest_s  # type: ignore[method-assign]
        nothing = KineticTournament()  # so few requests never reach it
        for bucket in scheduler._prefills._buckets.values():
            bucket.queue._rest = nothing
        assert memory.cache is not None
        rules = EvictionRules(num_blocks=self.num_blocks, recompute_s=granules_s, session_ttl_s=TTL_S)
        for tree in memory.cache.index.trees[0]:
            if isinstance(tree.order, ClassedOrder):
                tree.order._rules = rules
                tree.order._gaps = dict.fromkeys(tree.order._gaps, EVEN_RATES)  # type: ignore[arg-type]
        return scheduler


def long_rest_s(flight: SubmittedBatch, now_s: float) -> float:
    """Of a batch that may be held: of time only the order is explored."""
    return 100.0


class EvenRates:
    """Instead of measured gaps between uses, which have no end of states: every age is as good as any other."""

    num_fits = 0

    def rate(self, idle_s: float) -> float:
        """See ReuseGaps."""
        return 1.0

    def used(self, idle_s: float) -> None:
        """See ReuseGaps."""

    def gave_up(self, idle_s: float) -> None:
        """See ReuseGaps."""


EVEN_RATES = EvenRates()


def granules_s(first: int, end: int) -> float:
    """Seconds of computing granules, by ConstantCost."""
    return 1.0 * BLOCK * (end - first)


@dataclass(slots=True)
class State:
    """The scheduler, and what is left to happen."""

    scheduler: Scheduler
    pending: list[str]              # requests that have not arrived
    in_flight: list[Batch]          # oldest first
    left: list[int] = field(default_factory=list)   # of these, the ids of batches that have left the first stage
    num_aborts: int = 0
    num_failures: int = 0
    num_losses: int = 0
    num_late: int = 0
    now_s: float = 0.0

    @property
    def num_cached_blocks(self) -> int:
        """On both ranks."""
        return sum([pool.num_cached_blocks for pool in self.scheduler.memory.pools])

    @property
    def num_tokens(self) -> int:
        """Of all requests that live, those of their prompts and those they may still put out."""
        return sum([
            seq.request.num_prompt_tokens + seq.request.max_output_tokens for seq in self.scheduler.sequences
            if not seq.is_done
        ])  # fmt: skip
