"""Which prefills join the decodes of a batch, and with how many tokens: space sharing and the progress share."""

from __future__ import annotations

from math import inf
from typing import Protocol

from megatron_medha.core.cost.step_cost import CostModel, step_s
from megatron_medha.core.kv.kv_memory import ChunkShard, KVMemory
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.batch_builder import BatchBuilder, PlannedChunk
from megatron_medha.core.scheduling.chunking import STRATEGIES
from megatron_medha.core.scheduling.policies import relative_slack
from megatron_medha.core.scheduling.prefill_queue import PrefillCandidates
from megatron_medha.core.scheduling.prefix_siblings import PrefixSiblings
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

_MIN_OVERDUE_STEPS = 0.5  # the least worth of the chunks that savings pay for, in steps


class PrefillLimits(Protocol):
    """Limits that other systems put on prefills, of one batch after another. Ours has none of them."""

    def begin(self, memory: KVMemory, num_candidates: int) -> None:
        """A batch is being formed, from so many prefills."""

    def admit(self, seq: Sequence) -> bool:
        """Whether `seq` has begun, or may; if not, others pass it."""

    def max_prefill_tokens(self, builder: BatchBuilder, seq: Sequence, parts: tuple[ChunkShard, ...]) -> int | None:
        """How many tokens of `seq` the step may take; None: as many as fit."""

    def begun(self, seq: Sequence) -> None:
        """`seq` begins in this batch."""


class PrefillPacker:
    """Fills batches with prefill chunks; remembers what long and overdue prefills are owed.

    Space sharing (Medha section 4.2): the most urgent long prefill of a KVP rank gives min(rho, rho_max) of its
    time to short ones. Here this credit is saved up while nobody takes it, for at most `max_banked_steps`, so
    that a short prompt may have a whole step at once instead of a slice of several; over time the long one
    gives no more than its slack allows, and what nobody takes in a step it takes back in that step.

    Progress share: every step saves a share of its budget for the prefill that has been overdue longest. Once
    that pays for a chunk worth half a step (or for the end of the prompt) the chunk goes in, whatever the policy
    says, so that in overload too every wait is bounded. Smaller chunks would read a long context more often.

    The bound, with p = progress_share > 0, B = step_budget_s, and W(X) the seconds of X's prefill in chunks of half a
    step (PrefillTimes at B / 2; in cut tiles, where BatchBuilder.tile cuts them, at most 2.25 times that): a request X
    that owns KV, or for which there is memory, when it is the longest overdue has its first token by

        deadline(X) + (W(X) + sum of W(Y) + B / 2) / p + (n + 2) * B

    over the n requests Y with deadlines before X's: only those come before it, and after their first tokens never
    again; each step saves p * B; at most one step's saving is left over when one of them ends. It holds under every
    policy while steps keep their budget, whatever arrives later. Where batches may be held (overtaking.py), another's
    of E seconds may be in flight at the deadline; it is held for (1 / p - 1) * E at most, so E / p is added.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        memory: KVMemory,
        limits: PrefillLimits | None = None,
        siblings: PrefixSiblings | None = None,
    ) -> None:
        self._config = config
        self._cost = cost
        self._memory = memory
        self._limits = limits
        self._siblings = siblings
        self._shares_steps = config.has_space_sharing and STRATEGIES[config.chunking].is_by_time
        self._max_banked_s = config.max_banked_steps * config.step_budget_s
        self._banked_s = [self._max_banked_s] * memory.kvp
        self._overdue: Sequence | None = None
        self._overdue_credit_s = 0.0

    def pack(
        self, builder: BatchBuilder, candidates: PrefillCandidates, overdue: Sequence | None, now_s: float
    ) -> None:
        """Add chunks of `candidates`, most urgent first, each the largest that still fits (Medha Alg. 1 and 2).

        The batch is closed after more than max_skips candidates that did not fit. If nothing can run, nothing is
        changed: a replay need not know that somebody asked.
        """
        reservation = self._memory.reservation
        if overdue is not self._overdue:
            self._memory.reserve(None, 0.0)
        credit_s, overdue_chunk = self._overdue_chunk(builder, overdue)
        shared_budget_s = list(self._banked_s)
        used_s = [0.0] * len(shared_budget_s)
        long_ranks: set[int] = set()
        first: Sequence | None = None  # the most urgent one that could start
        num_skipped = num_without_memory = 0
        max_prefill_tokens: float = inf
        if not self.has_sequence_slot(overdue):
            candidates.exclude_waiting()
        has_others = len(candidates) > 1
        has_prefill = overdue_chunk is not None
        is_full = has_prefill and builder.is_full()
        limits, max_skips, siblings = self._limits, self._config.max_skips, self._siblings
        if limits is not None:
            limits.begin(self._memory, len(candidates))
        for seq in candidates:
            if num_skipped > max_skips or has_prefill and is_full:
                break
            if limits is not None and not limits.admit(seq):
                continue  # others may pass it: it does not count as one that did not fit
            if seq.num_unscheduled_tokens >= max_prefill_tokens:
                num_skipped += 1  # a long one beside the long ones there: not worth a closer look
                continue
            plan = self.plan(seq)
            if plan is None:
                num_without_memory += 1
                if num_without_memory > max_skips:
                    candidates.exclude_waiting()
                continue
            if plan and self.is_sooner_behind_another(seq, now_s):
                continue  # another begins in this batch, and computes what this one wants
            first = first or seq
            parts = self._memory.parts(seq, plan)
            num_guaranteed = 0
            if overdue_chunk is not None and seq is overdue_chunk.seq:
                builder.undefer(seq)  # its turn has come anyway: it gets what it is owed, or more
                num_guaranteed = overdue_chunk.num_tokens
            limit = None if limits is None else limits.max_prefill_tokens(builder, seq, parts)
            num_tokens, is_long = self._chunk(builder, seq, parts, num_guaranteed, long_ranks, limit)
            if not num_tokens and not has_prefill:
                # However full of decodes the step is, one tile goes in: less urgent ones must not pass a prefill
                # whose context has become so long that no tile fits beside them.
                num_tokens = builder.tile(seq, parts)
            if num_tokens <= 0:
                num_skipped += 1
                continue
            if plan:
                self.begin(seq, plan)
                if limits is not None:
                    limits.begun(seq)
                if not self.has_sequence_slot(overdue):
                    candidates.exclude_waiting()
            if is_long:
                long_ranks.update(part.kvp_rank for part in parts)
                num_kept = self._guaranteed_tokens(builder, seq, parts, num_tokens, shared_budget_s, has_others, now_s)
                builder.defer(PlannedChunk(seq, max(num_kept, num_guaranteed), parts), num_tokens)
                if has_others and len(long_ranks) == len(shared_budget_s):
                    candidates.exclude_large()
                    max_prefill_tokens = float(builder.max_prefill_tokens())
            else:
                self._add(builder, PlannedChunk(seq, num_tokens, parts), used_s)
            has_prefill, is_full = True, has_others and builder.is_full()
        for seq in builder.add_deferred():
            if seq.is_waiting:
                self._memory.release(seq)  # others have used the whole step: it has not begun after all
                if siblings is not None:
                    siblings.stop(seq)
        if not builder.prefills:
            self._add_tile(builder, first or overdue)
        self._memory.restore_cursors()
        if not builder.is_empty:
            self._update_credits(builder, overdue, credit_s, shared_budget_s, used_s, long_ranks)
        else:
            self._memory.reservation = reservation

    def plan(self, seq: Sequence) -> tuple[int, ...] | None:
        """KVP ranks for a sequence without KV, () for one that has it, None when there is no memory for it now."""
        return () if seq.block_table.shards else self._memory.plan(seq)

    def is_sooner_behind_another(self, seq: Sequence, now_s: float) -> bool:
        """Whether a sequence without KV had better wait for one that has just begun on a prefix they share."""
        return self._siblings is not None and self._siblings.is_sooner(seq, now_s)

    @property
    def has_no_limits(self) -> bool:
        """Whether only our own rules decide who may begin."""
        return self._limits is None

    def has_sequence_slot(self, overdue: Sequence | None) -> bool:
        """Whether one more sequence may own KV; the last place is kept for an overdue one that owns none."""
        num_places = self._config.max_num_sequences - self._memory.num_owners
        return num_places > (overdue is not None and not overdue.block_table.shards)

    def _chunk(
        self,
        builder: BatchBuilder,
        seq: Sequence,
        parts: tuple[ChunkShard, ...],
        num_guaranteed: int,
        long_ranks: set[int],
        limit: int | None,
    ) -> tuple[int, bool]:
        """Tokens of `seq` for this step, and whether it will hold up others for more than the step at hand."""
        if limit is not None or not self._shares_steps:
            return max(builder.fit(seq, parts, limit=limit), num_guaranteed), False
        if not long_ranks.isdisjoint(part.kvp_rank for part in parts):  # then only one that is not long may join
            is_long = not builder.fits_whole(seq, parts)
            return (num_guaranteed if is_long else seq.num_unscheduled_tokens), is_long
        num_tokens = max(builder.fit(seq, parts), num_guaranteed)
        return num_tokens, num_tokens < seq.num_unscheduled_tokens

    def _guaranteed_tokens(
        self,
        builder: BatchBuilder,
        seq: Sequence,
        parts: tuple[ChunkShard, ...],
        num_tokens: int,
        shared_budget_s: list[float],
        has_others: bool,
        now_s: float,
    ) -> int:
        """What a long prefill keeps for itself however many others come; what it gives is added to shared_budget_s."""
        given = min(max(relative_slack(seq, now_s), 0.0), self._config.max_relative_slack)
        if not given:
            return num_tokens
        offered_s = inf
        for part in parts:
            rank = part.kvp_rank
            saved_s = shared_budget_s[rank] + given * builder.budget_s
            shared_budget_s[rank] = min(saved_s, max(self._max_banked_s, given * builder.budget_s))
            offered_s = min(offered_s, shared_budget_s[rank])
        if not has_others:
            return num_tokens
        if offered_s >= builder.budget_s:
            return 0
        # Never less than a tile: where a tile takes most of a step, it gives whole steps now and then, not slices.
        num_kept = builder.fit(seq, parts, 1.0 - max(offered_s, 0.0) / builder.budget_s, num_tokens)
        return max(num_kept, min(builder.tile(seq, parts), num_tokens))

    def _add(self, builder: BatchBuilder, planned: PlannedChunk, used_s: list[float]) -> None:
        """Put in a chunk of one that is not long, and note what it takes of the credit that those give."""
        for part in planned.parts:
            used_s[part.kvp_rank] -= step_s(self._cost, builder.loads[part.kvp_rank])
        builder.add(planned)
        for part in planned.parts:
            used_s[part.kvp_rank] += step_s(self._cost, builder.loads[part.kvp_rank])

    def _overdue_chunk(self, builder: BatchBuilder, overdue: Sequence | None) -> tuple[float, PlannedChunk | None]:
        """What the overdue prefill has saved up by this step, and the chunk it pays for, held in the batch."""
        if overdue is None:
            return 0.0, None
        saved_s = self._overdue_credit_s if overdue is self._overdue else 0.0
        plan = self.plan(overdue)
        if plan is None or plan and self._memory.num_owners >= self._config.max_num_sequences:
            return saved_s, None  # no memory for it yet: what it could not use is not saved for it
        credit_s = saved_s + self._config.progress_share * builder.budget_s
        if credit_s < min(_MIN_OVERDUE_STEPS * builder.budget_s, overdue.remaining_work_s):
            return credit_s, None
        parts = self._memory.parts(overdue, plan)
        num_tokens = builder.fit_credit(overdue, parts, credit_s)
        if not num_tokens:
            return credit_s, None
        if plan:
            self.begin(overdue, plan)
        overdue_chunk = PlannedChunk(overdue, num_tokens, parts)
        builder.defer(overdue_chunk, overdue.num_unscheduled_tokens)
        return credit_s, overdue_chunk

    def _add_tile(self, builder: BatchBuilder, seq: Sequence | None) -> None:
        """Liveness: when nobody took what was kept for others, the most urgent one, or the overdue one, does."""
        if seq is None or (plan := self.plan(seq)) is None:
            return
        if plan and self._memory.num_owners >= self._config.max_num_sequences:
            return
        parts = self._memory.parts(seq, plan)
        num_tokens = max(builder.fit(seq, parts), builder.tile(seq, parts))
        if num_tokens > 0:
            if plan:
                self.begin(seq, plan)
            builder.add(PlannedChunk(seq, num_tokens, parts))

    def begin(self, seq: Sequence, plan: tuple[int, ...]) -> None:
        """Give a sequence the blocks of its plan."""
        self._memory.take(seq, plan)
        if self._siblings is not None:
            self._siblings.begin(seq)

    def _update_credits(
        self,
        builder: BatchBuilder,
        overdue: Sequence | None,
        credit_s: float,
        shared_budget_s: list[float],
        used_s: list[float],
        long_ranks: set[int],
    ) -> None:
        """Take from the savings what this step has used of them."""
        for planned in builder.prefills:
            if planned.seq is overdue:
                credit_s = max(0.0, credit_s - builder.share_s(planned))
        self._overdue, self._overdue_credit_s = overdue, credit_s
        self._memory.reserve(overdue, self._config.progress_share)
        # Where no long prefill runs there is nothing to protect. Tiles are coarse, so others may take more than was
        # given; what they owe is taken from the next credit.
        self._banked_s = [
            banked - used if rank in long_ranks else self._max_banked_s
            for rank, (banked, used) in enumerate(zip(shared_budget_s, used_s, strict=True))
        ]
