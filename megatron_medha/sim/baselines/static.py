"""Static context parallelism: every prompt on all instances, one pass at a time, first come first served.

As LoongServe's server with `use_fixed_sp`: a pass takes one long prompt, or as many short ones as stay within a time
and an activation limit; between two passes, while prompts wait, all answers take ten tokens. KV is spread evenly, so
every decode reads its context with all instances' bandwidth, and one of them does the linear work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_medha.core.batch import Arrived, Batch, Completed, Event, FinishReason, Output, TokenOut
from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.instance_batch import InstanceSequence, instance_batch, too_long
from megatron_medha.sim.baselines.ring_cost import RingCost


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticConfig:
    """Sizes and limits."""

    instances: tuple[int, ...]
    tokens_per_instance: int      # of KV
    max_prefill_s: float = 0.5    # of a pass over several prompts
    decode_rounds: int = 10       # between two passes
    compute_bound_sequences: int = 100  # of a decode batch, on one instance; more are spread over others
    max_sequences: int = 1000


class StaticSystem:
    """Decisions of one pool of instances that always work together."""

    def __init__(self, config: StaticConfig, cost: RingCost, ids: Iterable[int]) -> None:
        self._config = config
        self._cost = cost
        self._ids = iter(ids)
        self._waiting: deque[Request] = deque()
        self._members: list[InstanceSequence] = []
        self._in_flight: list[InstanceSequence] | None = None
        self._num_tokens = 0           # of KV
        self._num_promised_tokens = 0  # that running answers may still grow by
        self._num_rounds = config.decode_rounds
        self._released: list[str] = []

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See Decisions."""
        match event:
            case Arrived(request):
                if refusal := too_long(request, self._most_tokens):
                    return [refusal]
                self._waiting.append(request)
                return []
            case Completed():
                return self._complete(event.batch_id)
            case _:
                raise AssertionError(f"{event}: in this simulation nobody goes away and no rank is lost")

    def schedule(self, now_s: float) -> Batch | None:
        """See Decisions."""
        if self._in_flight is not None:
            return None
        if self._waiting and (self._num_rounds >= self._config.decode_rounds or not self._members):
            prompts = self._choose()
            if prompts:
                self._num_rounds = 0
                return self._batch(prompts, self._prefill_s([live.request for live in prompts]), now_s)
        if not self._members:
            return None
        self._num_rounds += 1
        members, self._members = self._members, []
        count, num_instances = len(members), len(self._config.instances)
        num_masters = min(num_instances, -(-count // self._config.compute_bound_sequences))
        seconds = self._cost.decode_s(num_instances, num_masters, count, -(-self._num_tokens // num_instances))
        self._num_tokens += count
        self._num_promised_tokens -= count
        return self._batch(members, seconds, now_s)

    @property
    def _most_tokens(self) -> int:
        return len(self._config.instances) * self._config.tokens_per_instance

    def _choose(self) -> list[InstanceSequence]:
        chosen: list[Request] = []
        while self._waiting and len(self._members) + len(chosen) < self._config.max_sequences:
            request = self._waiting[0]
            num_tokens = request.num_prompt_tokens + request.max_output_tokens
            if self._num_tokens + self._num_promised_tokens + num_tokens > self._most_tokens:
                break
            if chosen and self._prefill_s([*chosen, request]) > self._config.max_prefill_s:
                break
            chosen.append(self._waiting.popleft())
            self._num_tokens += request.num_prompt_tokens
            self._num_promised_tokens += request.max_output_tokens
        return [InstanceSequence(request) for request in chosen]

    def _prefill_s(self, prompts: list[Request]) -> float:
        return self._cost.prompts_s(len(self._config.instances), prompts)

    def _complete(self, batch_id: int) -> list[Output]:
        assert self._in_flight is not None
        outputs: list[Output] = []
        for live in self._in_flight:
            request = live.request
            live.num_output_tokens += 1
            is_last = live.num_output_tokens >= request.max_output_tokens
            outputs.append(TokenOut(request.request_id, batch_id, FinishReason.LENGTH if is_last else None))
            if is_last:
                # The last token's KV was never needed.
                self._num_tokens -= request.num_prompt_tokens + live.num_output_tokens - 1
                self._num_promised_tokens -= 1
                self._released.append(request.request_id)
            else:
                self._members.append(live)
        self._in_flight = None
        return outputs

    def _batch(self, sequences: list[InstanceSequence], seconds: float, now_s: float) -> Batch:
        self._in_flight = sequences
        return instance_batch(next(self._ids), self._config.instances, sequences, self._released, now_s, seconds)
