"""What the scheduler hands out and what comes back: chunks, batches, events, outputs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.request import Request


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, computed in one forward pass.

    A NamedTuple because a batch of decodes makes hundreds of them per step and
    building a frozen dataclass costs five times as much (measured, Python 3.11).
    """

    request_id: str
    start: int            # KV for [0, start) already exists
    num_tokens: int
    samples_token: bool   # the last position yields an output token
    kvp_ranks: tuple[int, ...] = (0,)


class Batch(NamedTuple):
    """One step's work. It, FirstStageDone and Completed come once per step, and are NamedTuples as Chunk is."""

    batch_id: int
    chunks: tuple[Chunk, ...]
    released: tuple[str, ...]  # requests whose state the ranks may forget before this batch
    created_s: float
    budget_s: float            # the step budget it was formed under
    predicted_s: float         # the cost model's belief when it was formed
    kv_ops: tuple[KVOp, ...] = ()  # executed in this order, after `released` and before the chunks
    # The oldest batch in flight that it may overtake: it has no sequence of that one, nor of any batch after it.
    overtakes: int | None = None
    may_be_held: bool = False  # long enough that another may overtake it; ranks look for one in no other

    def chunks_on(self, kvp_rank: int) -> tuple[Chunk, ...]:
        """The chunks that rank takes part in."""
        return tuple(chunk for chunk in self.chunks if kvp_rank in chunk.kvp_ranks)

    @property
    def num_tokens(self) -> int:
        """Query tokens over all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A client's request was accepted by the API server."""

    request: Request


class FirstStageDone(NamedTuple):
    """A batch left stage 0 of the pipeline."""

    batch_id: int


class Completed(NamedTuple):
    """A batch left the last stage."""

    batch_id: int
    duration_s: float                    # of the step itself, measured where it ran
    stopped: tuple[str, ...] = ()        # requests whose sampled token was a stop token
    failed: tuple[tuple[str, str], ...] = ()  # (request_id, why): a fault of that request alone
    # (request_id, keys): of granules that a sampled token has filled, to be appended to the request's prefix_keys
    filled_keys: tuple[tuple[str, bytes], ...] = ()
    held_s: float = 0.0  # that others overtook it in; not part of duration_s


@dataclass(frozen=True, slots=True)
class Aborted:
    """A request ends early: client gone, stop string seen, timeout."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RanksLost:
    """The ranks and all KV are gone; batches in flight will never complete."""

    why: str


@dataclass(frozen=True, slots=True)
class Woken:
    """The moment has come at which the scheduler wanted to look again."""


Event = Arrived | FirstStageDone | Completed | Aborted | RanksLost | Woken


class FinishReason(Enum):
    """Why a request's stream ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class TokenOut(NamedTuple):
    """The batch sampled a token for this request. A NamedTuple for the reason Chunk is one."""

    request_id: str
    batch_id: int
    finish_reason: FinishReason | None
    num_cached_tokens: int = 0  # with its first token: those of its prompt that were found when it was last begun


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence lost its KV to a decode that needed memory; it will be recomputed, but for what is cached of it."""

    request_id: str
    num_tokens_lost: int
    num_cached_tokens: int = 0  # computed ones that stay cached: they are not lost, unless they are evicted later


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request ended without (all of) its tokens; the client gets the reason."""

    request_id: str
    why: str
    is_client_fault: bool


Output = TokenOut | Preempted | Rejected
