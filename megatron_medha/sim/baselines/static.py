"""Static context parallelism: every prompt on all instances, one pass at a time, first come first served.

As LoongServe's server with `use_fixed_sp`: a pass takes one long prompt, or as many short ones as stay within a time
and an activation limit; between two passes, while prompts wait, all completions take ten tokens. KV is spread evenly,
so every decode reads its context with all instances' bandwidth, and one of them does the linear work.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_medha.core.batch import Batch, Output
from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.instance_system import (
    COMPUTE_BOUND_SEQUENCES,
    DECODE_ROUNDS,
    MAX_PREFILL_S,
    MAX_SEQUENCES,
    InstanceSequence,
    InstanceSystem,
)
from megatron_medha.sim.baselines.ring_cost import RingCost


class StaticSystem(InstanceSystem):
    """The scheduler of one pool of instances that always work together."""

    def __init__(
        self, instances: tuple[int, ...], tokens_per_instance: int, cost: RingCost, ids: Iterator[int]
    ) -> None:
        super().__init__(instances, tokens_per_instance, cost, ids)
        self._members: list[InstanceSequence] = []  # that decode
        self._in_flight: list[InstanceSequence] = []
        self._num_rounds = DECODE_ROUNDS

    def schedule(self, now_s: float) -> Batch | None:
        """See SchedulerProtocol."""
        if self._in_flight:
            return None
        num_instances = len(self._instances)
        prompts: list[Request] = []
        if self._num_rounds >= DECODE_ROUNDS or not self._members:
            prompts = self._choose()
        if prompts:
            self._num_rounds = 0
            self._in_flight = [InstanceSequence(request) for request in prompts]
            seconds = self._cost.prompts_s(num_instances, prompts)
        elif self._members:
            self._num_rounds += 1
            self._in_flight, self._members = self._members, []
            count = len(self._in_flight)
            # The last token's KV does not exist yet.
            num_keys = sum(live.request.num_prompt_tokens + live.num_output_tokens - 1 for live in self._in_flight)
            num_masters = min(num_instances, -(-count // COMPUTE_BOUND_SEQUENCES))
            seconds = self._cost.decode_s(num_instances, num_masters, count, -(-num_keys // num_instances))
        else:
            return None
        return self._batch(self._in_flight, self._instances, now_s, seconds)

    def _choose(self) -> list[Request]:
        chosen: list[Request] = []
        num_left = len(self._instances) * self._tokens_per_instance
        num_left -= sum(live.request.num_prompt_tokens + live.request.max_output_tokens for live in self._members)
        while self._waiting and len(self._members) + len(chosen) < MAX_SEQUENCES:
            request = self._waiting[0]
            num_left -= request.num_prompt_tokens + request.max_output_tokens
            if num_left < 0:
                break
            if chosen and self._cost.prompts_s(len(self._instances), [*chosen, request]) > MAX_PREFILL_S:
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _complete(self, batch_id: int) -> list[Output]:
        sequences, self._in_flight = self._in_flight, []
        return self._give_tokens(sequences, batch_id, self._members)
