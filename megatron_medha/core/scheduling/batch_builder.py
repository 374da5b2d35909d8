"""A batch while it is being formed: who is in it, with how much, and how long it would take."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.cost.step_cost import CostModel, StepLoad, step_s
from megatron_medha.core.kv.kv_memory import ChunkShard, KVMemory
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.chunking import STRATEGIES, ChunkRule, largest_in_time

_MAX_HALVINGS = 2       # of a tile that breaks a step's budget
_MIN_SAVED_SHARE = 0.25      # of a tile's time, by halving it; where reading the context takes most of it, little is
_MIN_TILE_SHARE = 0.5  # of the budget: a tile that takes no more is left whole, in a step full of others too


@dataclass(slots=True, eq=False)
class PlannedChunk:
    """A prefill chunk of the batch being formed."""

    seq: Sequence
    num_tokens: int
    parts: tuple[ChunkShard, ...]


@dataclass(slots=True, eq=False)
class _DeferredChunk:
    """A chunk whose final size is found when all others are in."""

    planned: PlannedChunk  # what is kept for it however many others come; its load is counted from the start
    num_wanted: int        # what it takes if nobody else comes


class BatchBuilder:
    """Collects decodes and prefill chunks, and keeps the load of every KVP rank. Used for one batch after another."""

    def __init__(self, rule: ChunkRule, cost: CostModel, memory: KVMemory) -> None:
        self.budget_s = 0.0
        self.loads: list[StepLoad] = []
        self.prefills: list[PlannedChunk] = []
        self._has_waiting_decodes = False
        self._deferred: list[_DeferredChunk] = []
        self._last_max_tokens = 0  # where the search for the next begins
        self._rule = rule
        self._strategy = STRATEGIES[rule.chunking]
        self._cost = cost
        self._memory = memory
        self._kvp = memory.kvp

    def begin(self, budget_s: float, has_waiting_decodes: bool) -> None:
        """Start an empty batch. has_waiting_decodes: somebody's next token waits for it, so that tiles may be cut."""
        self.budget_s = budget_s
        self._has_waiting_decodes = has_waiting_decodes
        self.loads = [StepLoad()] if self._kvp == 1 else [StepLoad() for _ in range(self._kvp)]
        self.prefills.clear()

    def add_decodes(self, sequences: list[Sequence]) -> None:
        """Add the next token of each."""
        if len(self.loads) == 1:
            context = len(sequences)
            for seq in sequences:
                context += seq.num_scheduled_tokens
            self.loads[0].add_decodes(len(sequences), context, self._cost.decode_attention_s(context))
            return
        nums = [0] * len(self.loads)
        contexts = [0] * len(self.loads)
        for seq in sequences:
            for part in self._memory.parts(seq, ()):
                nums[part.kvp_rank] += 1
                contexts[part.kvp_rank] += part.context + 1
        for rank, load in enumerate(self.loads):
            load.add_decodes(nums[rank], contexts[rank], self._cost.decode_attention_s(contexts[rank]))

    def fit(self, seq: Sequence, parts: tuple[ChunkShard, ...], share: float = 1.0, limit: int | None = None) -> int:
        """The most tokens of `seq`, `limit` at most, with which its ranks stay within `share` of the budget."""
        guess, budget_s = seq.last_chunk_tokens, self.budget_s * share
        wanted = min(seq.num_unscheduled_tokens, self._memory.chunk_limit(seq.num_scheduled_tokens))
        if limit is not None:
            wanted = min(wanted, limit)
        most = wanted
        for part in parts:
            load = self.loads[part.kvp_rank]
            most = self._strategy.largest(self._rule, self._cost, load, part.context, most, budget_s, guess)
        if not most and wanted > 0 and self._has_waiting_decodes:
            tile = min(self.tile(seq, parts), wanted)
            if tile > 0 and self._fits(parts, tile, budget_s):
                return tile
        return most

    def max_prefill_tokens(self) -> int:
        """No prefill, however little of it is computed, can have more tokens than this in the step."""
        rule = self._rule
        most = max([
            self._strategy.largest(rule, self._cost, load, 0, rule.max_tokens, self.budget_s, self._last_max_tokens)
            for load in self.loads
        ])
        self._last_max_tokens = most
        return most + rule.tile_tokens  # as a prompt's last chunk need not be whole tiles

    def fits_whole(self, seq: Sequence, parts: tuple[ChunkShard, ...]) -> bool:
        """Whether all of `seq` that is left stays within the budget on each of its ranks."""
        num_tokens, rule = seq.num_unscheduled_tokens, self._rule
        if num_tokens > rule.max_chunk_tokens or num_tokens > self._memory.chunk_limit(seq.num_scheduled_tokens):
            return False
        if any(self.loads[part.kvp_rank].num_tokens + num_tokens > rule.max_tokens for part in parts):
            return False
        return self._fits(parts, num_tokens, self.budget_s)

    def fit_credit(self, seq: Sequence, parts: tuple[ChunkShard, ...], credit_s: float) -> int:
        """The most tokens of `seq` that cost at most credit_s and keep the budget.

        One tile may break the budget if the credit pays for it: in a step full of decodes nothing else would.
        """
        most = min(seq.num_unscheduled_tokens, self._memory.chunk_limit(seq.num_scheduled_tokens))
        for part in parts:
            load = self.loads[part.kvp_rank]
            budget_s = min(self.budget_s, step_s(self._cost, load) + credit_s)
            most = largest_in_time(self._rule, self._cost, load, part.context, most, budget_s)
        if not most:
            tile = self.tile(seq, parts)
            if tile > 0 and all(self._extra_on_rank_s(part, tile) <= credit_s for part in parts):
                return tile
        return most

    def tile(self, seq: Sequence, parts: tuple[ChunkShard, ...]) -> int:
        """The least a chunk of `seq` can be: a tile, or the end of its prompt, shard or step buffer.

        Where the context is so long that a tile breaks the budget, and somebody's next token waits for the step, a tile
        is cut in two, and again: the prompt takes a little longer, and decodes beside it keep their pace.
        """
        tile = min(
            seq.num_unscheduled_tokens,
            self._memory.chunk_limit(seq.num_scheduled_tokens),
            self._rule.tile_tokens,
            self._rule.max_chunk_tokens,
            self._rule.max_tokens - self.num_tokens,
        )
        if tile < 2 or not self._has_waiting_decodes or not self._strategy.is_by_time:
            return tile
        tile_s = self.extra_s(parts, tile)
        for _ in range(_MAX_HALVINGS):
            half = tile // 2
            if half < 1 or tile_s <= _MIN_TILE_SHARE * self.budget_s or self._fits(parts, tile, self.budget_s):
                break
            half_s = self.extra_s(parts, half)
            if half_s > (1.0 - _MIN_SAVED_SHARE) * tile_s:
                break
            tile, tile_s = half, half_s
        return tile

    def add(self, planned: PlannedChunk) -> None:
        """Put a chunk into the batch."""
        self.prefills.append(planned)
        self._load(planned)

    def defer(self, planned: PlannedChunk, num_wanted: int) -> None:
        """Keep room for a chunk that is added when all others are in, with what they leave of num_wanted.

        Of several the one held last is added first.
        """
        self._deferred.insert(0, _DeferredChunk(planned, num_wanted))
        self._load(planned)

    def undefer(self, seq: Sequence) -> None:
        """Give up the room kept for `seq`; it must have been held."""
        (held,) = (held for held in self._deferred if held.planned.seq is seq)
        self._deferred.remove(held)
        self._unload(held.planned)

    def add_deferred(self) -> list[Sequence]:
        """Put the held chunks into the batch, as large as what is left allows; those that got nothing come back."""
        left_out: list[Sequence] = []
        for held in self._deferred:
            planned = held.planned
            if planned.num_tokens >= held.num_wanted:
                self.prefills.append(planned)
                continue
            self._unload(planned)
            count = max(planned.num_tokens, self.fit(planned.seq, planned.parts, limit=held.num_wanted))
            if count > 0:
                self.add(PlannedChunk(planned.seq, count, planned.parts))
            else:
                left_out.append(planned.seq)
        self._deferred.clear()
        return left_out

    def is_full(self) -> bool:
        """Whether no KVP rank can take one more token."""
        has_room = self._strategy.has_room
        return not any(has_room(self._rule, self._cost, load, self.budget_s) for load in self.loads)

    def share_s(self, planned: PlannedChunk) -> float:
        """How much shorter the step would be without this chunk of it."""
        return max(
            self._cost.linear_s(load.num_tokens, load.num_sequences)
            - self._cost.linear_s(load.num_tokens - planned.num_tokens, load.num_sequences - 1)
            + self._cost.attention_s(part.context, planned.num_tokens)
            for part in planned.parts
            for load in (self.loads[part.kvp_rank],)
        )

    def extra_s(self, parts: tuple[ChunkShard, ...], num_tokens: int) -> float:
        """How much longer the step would take with so many tokens more on these ranks."""
        return max([self._extra_on_rank_s(part, num_tokens) for part in parts])

    @property
    def slowest_load(self) -> StepLoad:
        """The load of the KVP rank that the step waits for."""
        return max(self.loads, key=lambda load: step_s(self._cost, load)) if len(self.loads) > 1 else self.loads[0]

    @property
    def num_tokens(self) -> int:
        """Query tokens on the fullest KVP rank."""
        loads = self.loads
        return loads[0].num_tokens if len(loads) == 1 else max([load.num_tokens for load in loads])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        loads = self.loads
        return not (loads[0].num_sequences if len(loads) == 1 else any(load.num_sequences for load in loads))

    def _load(self, planned: PlannedChunk) -> None:
        if planned.num_tokens:
            for part in planned.parts:
                attention_s = self._cost.attention_s(part.context, planned.num_tokens)
                self.loads[part.kvp_rank].add_chunk(part.context, planned.num_tokens, attention_s)

    def _unload(self, planned: PlannedChunk) -> None:
        if planned.num_tokens:
            for part in planned.parts:
                attention_s = self._cost.attention_s(part.context, planned.num_tokens)
                self.loads[part.kvp_rank].remove_chunk(part.context, planned.num_tokens, attention_s)

    def _fits(self, parts: tuple[ChunkShard, ...], num_tokens: int, budget_s: float) -> bool:
        for part in parts:
            if step_s(self._cost, self.loads[part.kvp_rank]) + self._extra_on_rank_s(part, num_tokens) > budget_s:
                return False
        return True

    def _extra_on_rank_s(self, part: ChunkShard, num_tokens: int) -> float:
        load = self.loads[part.kvp_rank]
        return (
            self._cost.linear_s(load.num_tokens + num_tokens, load.num_sequences + 1)
            - self._cost.linear_s(load.num_tokens, load.num_sequences)
            + self._cost.attention_s(part.context, num_tokens)
        )
