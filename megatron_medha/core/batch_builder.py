"""A batch while it is being formed: who is in it, with how much, and how long it would take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from megatron_medha.core.chunking import Chunking, ChunkRule, largest_chunk
from megatron_medha.core.cost import CostModel, StepLoad, step_s
from megatron_medha.core.memory import KVMemory, Part
from megatron_medha.core.request import Sequence


class Planned(NamedTuple):
    """A prefill chunk of the batch being formed."""

    seq: Sequence
    num_tokens: int
    parts: tuple[Part, ...]


class BatchBuilder:
    """Collects decodes and prefill chunks, and keeps the load of every KVP rank."""

    def __init__(self, rule: ChunkRule, cost: CostModel, memory: KVMemory, budget_s: float) -> None:
        self.budget_s = budget_s
        self.loads = [StepLoad() for _ in range(memory.kvp)]
        self.prefills: list[Planned] = []
        self._held: list[Planned] = []                # will be added last, with what is left but at least this much
        self._held_s = [0.0] * memory.kvp             # time kept for them, by KVP rank
        self._rule = rule
        self._cost = cost
        self._memory = memory

    def add_decodes(self, sequences: Iterable[Sequence]) -> None:
        """Add the next token of each."""
        num = [0] * len(self.loads)
        context = [0] * len(self.loads)
        for seq in sequences:
            shards = seq.block_table.shards
            if len(shards) == 1:
                rank = shards[0].kvp_rank
                num[rank] += 1
                context[rank] += seq.num_scheduled_tokens + 1
            else:
                for part in self._memory.parts(seq, ()):
                    num[part.kvp_rank] += 1
                    context[part.kvp_rank] += part.context + 1
        for rank, load in enumerate(self.loads):
            load.add_decodes(num[rank], context[rank], self._cost.decode_attention_s(context[rank]))

    def fit(self, seq: Sequence, parts: tuple[Part, ...], share: float = 1.0) -> int:
        """The most tokens of `seq` with which each of its ranks stays within `share` of the budget."""
        limit = min(seq.num_unscheduled_tokens, self._memory.chunk_limit(seq.num_scheduled_tokens))
        for rank, context in parts:
            budget_s = (self.budget_s - self._held_s[rank]) * share
            limit = largest_chunk(self._rule, self._cost, self.loads[rank], context, limit, budget_s)
        return limit

    def fit_credit(self, seq: Sequence, parts: tuple[Part, ...], credit_s: float) -> int:
        """The most tokens of `seq` that cost at most credit_s and keep the budget.

        One tile may break the budget if the credit pays for it: in a step full of decodes nothing else would.
        """
        rule = replace(self._rule, chunking=Chunking.ADAPTIVE)
        limit = min(seq.num_unscheduled_tokens, self._memory.chunk_limit(seq.num_scheduled_tokens))
        for rank, context in parts:
            load = self.loads[rank]
            budget_s = min(self.budget_s, step_s(self._cost, load) + credit_s)
            limit = largest_chunk(rule, self._cost, load, context, limit, budget_s)
        if not limit:
            tile = self.tile(seq)
            if tile > 0 and all(self._extra_s(part, tile) <= credit_s for part in parts):
                return tile
        return limit

    def tile(self, seq: Sequence) -> int:
        """The least a chunk of `seq` can be: a tile, or the end of its prompt, shard or step buffer."""
        return min(
            seq.num_unscheduled_tokens,
            self._memory.chunk_limit(seq.num_scheduled_tokens),
            self._rule.tile_tokens,
            self._rule.max_tokens - self.num_tokens,
        )

    def add(self, planned: Planned) -> None:
        """Put a chunk into the batch."""
        self.prefills.append(planned)
        for rank, context in planned.parts:
            attention_s = self._cost.attention_s(context, planned.num_tokens)
            self.loads[rank].add_chunk(context, planned.num_tokens, attention_s)

    def hold(self, planned: Planned) -> None:
        """Keep time for a chunk that is added when all others are in, with all the time they leave."""
        self._held.append(planned)
        for part in planned.parts:
            self._held_s[part.kvp_rank] += self._extra_s(part, planned.num_tokens)

    def add_held(self) -> None:
        """Put the held chunks into the batch, as large as what is left allows."""
        for planned in self._held:
            for part in planned.parts:
                self._held_s[part.kvp_rank] -= self._extra_s(part, planned.num_tokens)
            count = max(planned.num_tokens, self.fit(planned.seq, planned.parts))
            # Others may have filled the step's buffers meanwhile; the held chunk waits a step then.
            count = min(count, self._rule.max_tokens - self.num_tokens)
            if count > 0:
                self.add(planned._replace(num_tokens=count))
        self._held.clear()

    def is_full(self) -> bool:
        """Whether no KVP rank can take one more token."""
        if self._rule.chunking is Chunking.FIXED:
            return min(load.num_tokens for load in self.loads) >= self._rule.fixed_tokens
        return all(
            load.num_tokens >= self._rule.max_tokens
            or self._rule.chunking is Chunking.ADAPTIVE
            and self._cost.linear_s(load.num_tokens + 1, load.num_sequences + 1) + load.attention_s
            > self.budget_s - held_s
            for load, held_s in zip(self.loads, self._held_s, strict=True)
        )

    def predicted_s(self) -> float:
        """How long the step would take now: that of its slowest KVP rank."""
        return max(step_s(self._cost, load) for load in self.loads)

    @property
    def slowest_load(self) -> StepLoad:
        """The load of the KVP rank that the step waits for."""
        return max(self.loads, key=lambda load: step_s(self._cost, load))

    @property
    def num_tokens(self) -> int:
        """Query tokens on the fullest KVP rank."""
        return max(load.num_tokens for load in self.loads)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not any(load.num_sequences for load in self.loads)

    def _extra_s(self, part: Part, num_tokens: int) -> float:
        if not num_tokens:
            return 0.0
        load = self.loads[part.kvp_rank]
        return (
            self._cost.linear_s(load.num_tokens + num_tokens, load.num_sequences + 1)
            - self._cost.linear_s(load.num_tokens, load.num_sequences)
            + self._cost.attention_s(part.context, num_tokens)
        )
