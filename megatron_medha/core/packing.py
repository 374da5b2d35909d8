"""Which prefills join the decodes of a batch, and with how many tokens: space sharing and the progress share."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_medha.core.batch_builder import BatchBuilder, Planned
from megatron_medha.core.chunking import Chunking
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import CostModel, step_s
from megatron_medha.core.memory import KVMemory, Part
from megatron_medha.core.policies import relative_slack
from megatron_medha.core.request import Sequence


class PrefillPacker:
    """Fills batches with prefill chunks; remembers what long and overdue prefills are owed.

    Space sharing (Medha section 4.2): the most urgent long prefill of a KVP rank gives min(rho, rho_max) of its
    time to short ones. Here the gift is saved up while nobody takes it, for at most `max_saved_gift_steps`, so
    that a short prompt may have a whole step at once instead of a slice of several; over time the long one
    gives no more than its slack allows, and what nobody takes in a step it takes back in that step.

    Progress share: every step saves a share of its budget for the prefill that has been overdue longest. Once
    that pays for a chunk the chunk goes in, whatever the policy says, so that in overload too
    every wait is bounded.
    """

    def __init__(self, config: SchedulerConfig, cost: CostModel, memory: KVMemory) -> None:
        self._config = config
        self._cost = cost
        self._memory = memory
        self._gift_s = [self._max_gift_s] * memory.kvp
        self._overdue: Sequence | None = None
        self._credit_s = 0.0

    def pack(
        self, builder: BatchBuilder, candidates: Iterable[Sequence], overdue: Sequence | None, now_s: float
    ) -> None:
        """Add chunks of `candidates`, most urgent first, each the largest that still fits (Medha Alg. 1 and 2).

        The batch is closed after more than max_skips candidates that did not fit.
        """
        owed = self._owed_chunk(builder, overdue)
        if owed is not None:
            builder.hold(owed)
        before_s = [step_s(self._cost, load) for load in builder.loads]
        long_ranks: set[int] = set()
        num_skipped = 0
        for seq in candidates:
            if num_skipped > self._config.max_skips or builder.is_full():
                break
            if owed is not None and seq is owed.seq:
                continue
            plan = self._plan(seq)
            if plan is None:
                num_skipped += 1
                continue
            parts = self._memory.parts(seq, plan)
            num_tokens = builder.fit(seq, parts)
            if not num_tokens and not builder.prefills and not long_ranks and owed is None:
                # Liveness: however full of decodes the step is, one tile goes in.
                num_tokens = builder.tile(seq)
            is_long = self._is_long(seq, num_tokens)
            if is_long and not long_ranks.isdisjoint(part.kvp_rank for part in parts):
                num_tokens = 0
            if num_tokens <= 0:
                num_skipped += 1
                continue
            if plan:
                self._memory.take(seq, plan)
            if is_long:
                long_ranks.update(part.kvp_rank for part in parts)
                builder.hold(Planned(seq, self._kept_chunk(builder, seq, parts, num_tokens, now_s), parts))
            else:
                builder.add(Planned(seq, num_tokens, parts))
        self._settle_gifts(builder, before_s, long_ranks)
        builder.add_held()
        if any(planned.seq is overdue for planned in builder.prefills):
            self._credit_s = 0.0  # served, by its credit or by the policy: saving starts anew

    @property
    def _max_gift_s(self) -> float:
        return self._config.max_saved_gift_steps * self._config.step_budget_s

    def _plan(self, seq: Sequence) -> tuple[int, ...] | None:
        """KVP ranks for a sequence without KV, () for one that has it, None when it cannot have any now."""
        if seq.block_table.shards:
            return ()
        num_places = self._config.max_num_sequences - self._memory.num_owners
        if self._overdue is not None and seq is not self._overdue and not self._overdue.block_table.shards:
            num_places -= 1  # the last place among the KV owners is the overdue one's
        return self._memory.plan(seq) if num_places > 0 else None

    def _is_long(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether it will hold up others for more than the step at hand."""
        config = self._config
        if not config.has_space_sharing or config.chunking is not Chunking.ADAPTIVE:
            return False
        if config.long_prefill_tokens is not None:
            return seq.num_scheduled_tokens >= config.long_prefill_tokens
        return num_tokens < seq.num_unscheduled_tokens

    def _kept_chunk(
        self, builder: BatchBuilder, seq: Sequence, parts: tuple[Part, ...], num_tokens: int, now_s: float
    ) -> int:
        """What a long prefill keeps for itself however many others come."""
        given = min(max(relative_slack(seq, now_s), 0.0), self._config.max_relative_slack)
        if not given:
            return num_tokens
        gift_s = self._max_gift_s
        for part in parts:
            saved_s = self._gift_s[part.kvp_rank] + given * builder.budget_s
            self._gift_s[part.kvp_rank] = min(saved_s, max(self._max_gift_s, given * builder.budget_s))
            gift_s = min(gift_s, self._gift_s[part.kvp_rank])
        share = 1.0 - min(gift_s / builder.budget_s, 1.0)
        return min(builder.fit(seq, parts, share), num_tokens)

    def _settle_gifts(self, builder: BatchBuilder, before_s: list[float], long_ranks: set[int]) -> None:
        """Take from the savings what others have used; where no long prefill runs there is nothing to protect."""
        for rank, load in enumerate(builder.loads):
            if rank in long_ranks:
                used_s = step_s(self._cost, load) - before_s[rank]
                self._gift_s[rank] = max(0.0, self._gift_s[rank] - used_s)
            else:
                self._gift_s[rank] = self._max_gift_s

    def _owed_chunk(self, builder: BatchBuilder, overdue: Sequence | None) -> Planned | None:
        """The chunk that the progress share pays for in this step, if it does."""
        if overdue is not self._overdue:
            self._overdue, self._credit_s = overdue, 0.0
        self._memory.reserve(overdue, self._config.progress_share)
        if overdue is None or overdue.num_scheduled_tokens > overdue.num_first_stage_tokens:
            return None  # nobody is late, or the late one's last chunk is still in stage 0
        self._credit_s += self._config.progress_share * builder.budget_s
        plan = self._plan(overdue)
        if plan is None:
            return None
        parts = self._memory.parts(overdue, plan)
        num_tokens = builder.fit_credit(overdue, parts, self._credit_s)
        if not num_tokens:
            return None
        if plan:
            self._memory.take(overdue, plan)
        return Planned(overdue, num_tokens, parts)
