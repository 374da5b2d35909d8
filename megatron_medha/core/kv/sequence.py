"""A request being computed: the cursors of the stream pipeline and the block table. Tokens are only counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from megatron_medha.core.kv.block_table import BlockTable
from megatron_medha.core.request import Request


class Status(Enum):
    """Where a sequence stands; it moves only along LIFECYCLE."""

    WAITING = "waiting"        # no KV, nothing computed (new, or restarted after it lost its KV)
    PREFILLING = "prefilling"  # owns KV for its whole prompt; computed in chunks, possibly paused between two
    DECODING = "decoding"      # every known token but the last is computed
    FINISHED = "finished"
    ABORTED = "aborted"        # by the client or by a fault of this request alone

    # There is one object of each. Enum's own is a call into Python, several per step of the scheduler.
    __hash__ = object.__hash__


LIFECYCLE: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.PREFILLING, Status.ABORTED}),
    Status.PREFILLING: frozenset({Status.DECODING, Status.FINISHED, Status.WAITING, Status.ABORTED}),
    Status.DECODING: frozenset({Status.FINISHED, Status.WAITING, Status.ABORTED}),
    Status.FINISHED: frozenset(),
    Status.ABORTED: frozenset(),
}


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request on its way, with the cursors of the stream pipeline.

    num_computed_tokens <= num_first_stage_tokens <= num_scheduled_tokens <= num_known_tokens, always. While it waits,
    the first three stand behind what the prefix cache has of it, of which it holds nothing.
    """

    request: Request
    deadline_s: float = inf        # absolute, for the first token
    triage_deadline_s: float = inf   # the deadline that triage goes by; inf: it is never given up
    margin_s: float = 0.0          # safety margin before its deadline, of policies that go by slack
    total_work_s: float = 0.0      # predicted time of the whole prefill, alone, behind num_promised_tokens
    status: Status = Status.WAITING
    num_scheduled_tokens: int = 0    # handed to the runtime
    num_first_stage_tokens: int = 0  # past stage 0: the next chunk of a prompt starts there
    num_computed_tokens: int = 0     # past the last stage: KV exists in every layer
    num_output_tokens: int = 0
    num_preemptions: int = 0         # times the KV was lost and had to be recomputed
    num_batches_in_flight: int = 0
    keys: bytes = b""                # of the full granules of its known tokens; empty: it is not cached
    # Of its known tokens, those that were in the prefix cache when it last began, or that are while it waits.
    num_cached_tokens: int = 0
    num_promised_tokens: int = 0     # the least of these since it arrived: its deadline counts the work of all others
    last_chunk_tokens: int = 0       # of its prefill; the next one is likely to be of about that size
    remaining_work_s: float = 0.0    # of the prefill; kept by the scheduler as chunks are scheduled
    capacity_tokens: int = 0         # tokens its blocks hold
    grow_tokens: int = 0             # a decode that has computed so many ends, or wants a block
    first_scheduled_s: float | None = None
    block_table: BlockTable = field(default_factory=BlockTable)
    request_id: str = field(init=False)  # the request's: asked for too often to be a property

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens whose values exist."""
        return self.request.num_prompt_tokens + self.num_output_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Known tokens no batch has been given yet."""
        return self.request.num_prompt_tokens + self.num_output_tokens - self.num_scheduled_tokens

    @property
    def is_mostly_cached(self) -> bool:
        """Whether it goes on from what is cached: most of its prompt was when it arrived, and has stayed since."""
        return 2 * self.num_promised_tokens > self.request.num_prompt_tokens

    @property
    def triage_s(self) -> float:
        """When it can no longer meet triage_deadline_s, however fast it goes."""
        return self.triage_deadline_s - self.remaining_work_s

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of it is computed and it owns no KV."""
        return self.status is Status.WAITING

    @property
    def is_prefill(self) -> bool:
        """Whether chunks, not single tokens, are what it needs next."""
        return self.status is Status.WAITING or self.status is Status.PREFILLING

    @property
    def is_done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status is Status.FINISHED or self.status is Status.ABORTED

    def start_behind(self, num_tokens: int) -> None:
        """It owns no KV; all it has to compute is what follows `num_tokens` cached ones."""
        self.num_scheduled_tokens = self.num_first_stage_tokens = self.num_computed_tokens = num_tokens

    def move_to(self, status: Status) -> None:
        """Change status along LIFECYCLE; anything else is a bug."""
        assert status in LIFECYCLE[self.status], f"{self.request_id}: {self.status.value} -> {status.value}"
        self.status = status
