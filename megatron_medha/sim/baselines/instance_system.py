"""What systems of instances share: whole prompts in one pass, then a token a round, in batches that occupy instances.

The limits are those of LoongServe's server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_medha.core.batch import Arrived, Batch, Chunk, Completed, Event, FinishReason, Output, Rejected, TokenOut
from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.ring_cost import RingCost

MAX_PREFILL_S = 0.5            # of a pass over several prompts; a single one may take any time
MAX_SEQUENCES = 1000           # that run at the same time
DECODE_ROUNDS = 10             # between two admissions of prompts
COMPUTE_BOUND_SEQUENCES = 100  # of a decode batch on one instance; more are spread over others


@dataclass(slots=True, eq=False)
class InstanceSequence:
    """A request that runs."""

    request: Request
    num_output_tokens: int = 0
    kv_tokens: dict[int, int] = field(default_factory=dict)  # by instance


class InstanceSystem(ABC):
    """The scheduler of one pool of instances. Batch ids are taken from `ids`, so that several pools can share a world.

    tokens_per_instance: of KV.
    """

    def __init__(
        self, instances: tuple[int, ...], tokens_per_instance: int, cost: RingCost, ids: Iterator[int]
    ) -> None:
        self._instances = instances
        self._tokens_per_instance = tokens_per_instance
        self._cost = cost
        self._ids = ids
        self._waiting: deque[Request] = deque()
        self._released: list[str] = []

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See SchedulerProtocol."""
        match event:
            case Arrived(request):
                num_tokens = request.num_prompt_tokens + request.max_output_tokens
                if num_tokens > (most := len(self._instances) * self._tokens_per_instance):
                    why = f"{num_tokens} tokens exceed the {most} that fit"
                    return [Rejected(request.request_id, why, is_client_fault=True)]
                self._waiting.append(request)
                return []
            case Completed():
                return self._complete(event.batch_id)
            case _:
                raise AssertionError(f"{event}: in this simulation nobody goes away and no rank is lost")

    @abstractmethod
    def schedule(self, now_s: float) -> Batch | None:
        """See SchedulerProtocol."""

    @abstractmethod
    def _complete(self, batch_id: int) -> list[Output]:
        """A batch has run."""

    def _give_tokens(
        self, sequences: list[InstanceSequence], batch_id: int, alive: list[InstanceSequence]
    ) -> list[Output]:
        """A token for each; those that need more are added to `alive`."""
        outputs: list[Output] = []
        for live in sequences:
            request = live.request
            live.num_output_tokens += 1
            is_last = live.num_output_tokens >= request.max_output_tokens
            outputs.append(TokenOut(request.request_id, batch_id, FinishReason.LENGTH if is_last else None))
            if is_last:
                self._forget(live)
            else:
                alive.append(live)
        return outputs

    def _forget(self, live: InstanceSequence) -> None:
        """A sequence has ended."""
        self._released.append(live.request.request_id)

    def _batch(
        self, sequences: list[InstanceSequence], instances: tuple[int, ...], now_s: float, seconds: float
    ) -> Batch:
        """A pass over the whole prompts of new sequences, or the next token of others."""
        chunks: list[Chunk] = []
        for live in sequences:
            request = live.request
            start = request.num_prompt_tokens + live.num_output_tokens - 1 if live.num_output_tokens else 0
            num_tokens = 1 if start else request.num_prompt_tokens
            chunks.append(Chunk(request.request_id, start, num_tokens, True, instances))
        released = tuple(self._released)
        self._released.clear()
        return Batch(next(self._ids), tuple(chunks), released, now_s, budget_s=seconds, predicted_s=seconds)
