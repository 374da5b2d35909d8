"""Batches that can be held: how large one may be, what may overtake it, and when that is worth what it costs.

A batch of prefill chunks that takes long may be held by the ranks, at points a few milliseconds apart, while another
batch overtakes it. So a prompt alone is computed in large chunks, and a short prompt or the next token of running
requests still waits for such a point, not for the end of the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf

from megatron_medha.core.cost.step_cost import CostModel, step_s
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.batch_builder import BatchBuilder, PlannedChunk
from megatron_medha.core.scheduling.batch_committer import SubmittedBatch
from megatron_medha.core.scheduling.chunking import STRATEGIES, efficient_chunk_tokens
from megatron_medha.core.scheduling.policies import Policy, policy_named, slack_s
from megatron_medha.core.scheduling.prefill_packer import PrefillPacker
from megatron_medha.core.scheduling.prefill_queue import PrefillCandidates
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

POINT_S = 0.01             # between two points at which ranks look for a batch that overtakes, at most
_MIN_HELD_STAGE_S = 0.02   # a batch that occupies a stage for less is waited for
_SWITCH_SHARE = 0.1        # of the fixed cost of a step, to hold a batch and go on with it: one layer's weights again
_REST_SHARE = 0.1         # of its time so far, that a batch which takes longer than predicted still takes
_NO_LIMIT_S = 1e9


def is_useful(config: SchedulerConfig, policy: Policy) -> bool:
    """Whether short prompts can overtake large chunks, so that prompts alone may have them."""
    return STRATEGIES[config.chunking].is_by_time and config.is_preemptive and policy.is_by_deadline


def resolved(config: SchedulerConfig, can_hold: bool) -> SchedulerConfig:
    """The configuration with interruptible on or off. can_hold: what the ranks say. Raises ConfigError.

    Without a progress share nothing would bound for how long a batch is held: then auto is off.
    """
    if config.interruptible is True and not can_hold:
        raise ConfigError(
            "scheduler.interruptible=true: these ranks cannot hold a step; they have to be CPU ranks of one machine. "
            "Set auto or false"
        )
    if config.interruptible != "auto":
        return config
    is_on = can_hold and config.progress_share > 0.0 and is_useful(config, policy_named(config.policy))
    return replace(config, interruptible=is_on)


class Overtaking:
    """Decides about batches that may be held. It keeps nothing but its configuration."""

    def __init__(
        self, config: SchedulerConfig, cost: CostModel, memory: KVMemory, policy: Policy, spp: int,
        packer: PrefillPacker,
    ) -> None:  # fmt: skip
        self.is_on = config.interruptible is True
        self._config = config
        self._rule = config.chunk_rule
        self._cost = cost
        self._memory = memory
        self._policy = policy
        self._spp = spp
        self._packer = packer
        self._can_enlarge = is_useful(config, policy)

    @property
    def switch_s(self) -> float:
        """Predicted time that it costs to hold a batch and to go on with it."""
        return _SWITCH_SHARE * self._cost.linear_s(1, 1)

    @property
    def _delay_s(self) -> float:
        """How much longer a batch that overtakes is on its way than it takes: it waits for a point on each stage."""
        return self.switch_s + self._spp * POINT_S

    def holds_s(self, predicted_s: float) -> float:
        """For how long a batch holds another, on each stage."""
        return (predicted_s + self.switch_s) / self._spp

    # ---- a batch that may be held ----

    def may_be_held(self, num_decodes: int, predicted_s: float) -> bool:
        """Whether ranks shall look for batches that overtake it. Tokens that somebody waits for are never held."""
        return self.is_on and not num_decodes and predicted_s / self._spp >= _MIN_HELD_STAGE_S

    def enlarge(
        self, builder: BatchBuilder, decodes: list[Sequence], elsewhere: list[Sequence], waited_s: float,
        overdue: Sequence | None, now_s: float,
    ) -> list[Sequence]:  # fmt: skip
        """Make the only prefill chunk of a batch as large as is efficient; the decodes that stay in it come back.

        Running decodes leave it if the prefill is predicted to be faster with them in steps that overtake. elsewhere:
        those behind the first stage, that will be back. waited_s: how long the first of the others has waited: who has
        waited for a whole budget is not left out again.
        """
        if not self.is_on or not self._can_enlarge or len(builder.prefills) != 1:
            return decodes
        (planned,) = builder.prefills
        if overdue is not None and overdue is not planned.seq or decodes and waited_s > builder.budget_s:
            return decodes
        budget_s, small_s = builder.budget_s, step_s(self._cost, builder.slowest_load)
        running = decodes + elsewhere
        decode_s = self.decode_s(builder, running) if running else 0.0
        if running and decode_s + self._delay_s > budget_s:
            return self._planned_again(builder, decodes, planned, budget_s)
        num_tokens = self._efficient_tokens(builder, planned, budget_s, now_s)
        builder.begin(budget_s, False)
        builder.add(PlannedChunk(planned.seq, num_tokens, planned.parts))
        large_s = step_s(self._cost, builder.slowest_load)
        decode_share = (decode_s + self.switch_s) / budget_s if running else 0.0
        is_better = num_tokens * (1.0 - decode_share) / large_s > planned.num_tokens / small_s
        if num_tokens > planned.num_tokens and (is_better or not running):
            builder.budget_s = max(budget_s, large_s)
            return []
        return self._planned_again(builder, decodes, planned, budget_s)

    def _planned_again(
        self, builder: BatchBuilder, decodes: list[Sequence], planned: PlannedChunk, budget_s: float
    ) -> list[Sequence]:
        builder.begin(budget_s, bool(decodes))
        builder.add_decodes(decodes)
        builder.add(planned)
        return decodes

    def _efficient_tokens(self, builder: BatchBuilder, planned: PlannedChunk, budget_s: float, now_s: float) -> int:
        """Of a chunk alone. One whose deadline is near is no longer than it has slack, to be given to others."""
        seq, parts = planned.seq, planned.parts
        limit = min(self._rule.max_tokens, self._rule.max_chunk_tokens)
        context = max([part.context for part in parts])
        best = efficient_chunk_tokens(
            self._cost, context, seq.num_unscheduled_tokens, limit, self._rule.tile_tokens, self._spp
        )
        spare_s = slack_s(seq, now_s)
        builder.begin(max(spare_s, budget_s) if spare_s >= 0.0 else _NO_LIMIT_S, False)
        return builder.fit(seq, parts, limit=best)

    # ---- what overtakes it ----

    def overtaken(self, in_flight: Iterable[SubmittedBatch], now_s: float) -> SubmittedBatch | None:
        """The newest batch that is predicted to run for long enough that another may overtake it; None: there is none.

        One batch overtakes at a time, in all the pipeline. What is on the first stage has to be one that may be held.
        """
        if not self.is_on:
            return None
        found = None
        for flight in in_flight:
            batch = flight.batch
            if batch.overtakes is not None or self._spp > 1 and any(op.kind == "copy" for op in batch.kv_ops):
                return None
            # What follows a batch behind the first stage waits for it no longer than for a step, or else overtakes it.
            is_short = flight.has_left_first_stage and batch.predicted_s / self._spp <= self._config.step_budget_s
            if batch.may_be_held and not is_short and self._rest_s(flight, now_s) > POINT_S:
                found = flight
            elif not flight.has_left_first_stage:
                return None
        return found

    def decode_s(self, builder: BatchBuilder, decodes: list[Sequence]) -> float:
        """Predicted time of a step of these decodes alone."""
        builder.begin(0.0, True)
        builder.add_decodes(decodes)
        return step_s(self._cost, builder.slowest_load)

    def decodes_due_s(
        self, builder: BatchBuilder, decodes: list[Sequence], since_s: float, budget_s: float
    ) -> float:
        """When decodes that wait since then have to overtake, so that their next tokens are there within the budget."""
        return since_s + max(0.0, budget_s - self.decode_s(builder, decodes) - self._delay_s)

    def pack(
        self, builder: BatchBuilder, flight: SubmittedBatch, in_flight: Iterable[SubmittedBatch],
        candidates: PrefillCandidates, decodes: list[Sequence], overdue: Sequence | None, now_s: float,
    ) -> list[Sequence]:  # fmt: skip
        """Fill a begun batch that overtakes those in flight; the decodes in it come back. It may stay empty.

        flight: the newest that it overtakes. decodes: those that are due.
        """
        rest_s, left_s = self._rest_s(flight, now_s), min([self._left_s(other) for other in in_flight])
        taken: list[Sequence] = []
        if decodes:
            builder.add_decodes(decodes)
            if self.holds_s(step_s(self._cost, builder.slowest_load)) > left_s:
                builder.begin(builder.budget_s, False)
                return []
            taken = decodes
        if self._config.is_preemptive and self._packer.has_no_limits:
            held = [seq for seq in flight.sequences if not seq.is_done]
            # A later stage may execute the operations of batches in another order than they were formed in.
            dropped = {op.request_id for other in in_flight for op in other.batch.kv_ops if op.kind == "drop"}
            self._add_prefills(builder, held, dropped, candidates, overdue, rest_s, left_s, now_s)
        self._memory.restore_cursors()
        return taken

    def _add_prefills(
        self, builder: BatchBuilder, held: list[Sequence], dropped: set[str], candidates: PrefillCandidates,
        overdue: Sequence | None, rest_s: float, left_s: float, now_s: float,
    ) -> None:  # fmt: skip
        """Those that wait for less than the batch in flight still takes, and are worth what they cost it."""
        num_skipped = 0
        for seq in candidates:
            if num_skipped > self._config.max_skips or builder.is_full():
                break
            if seq.num_batches_in_flight or seq.request_id in dropped:
                continue
            if not self._is_urgent(seq, held, rest_s, now_s) or not self._add(
                builder, seq, held, overdue, rest_s, left_s, now_s
            ):
                num_skipped += 1

    def _is_urgent(self, seq: Sequence, held: list[Sequence], rest_s: float, now_s: float) -> bool:
        """Whether a prefill comes before those held: by class, and by a policy that does not go by deadlines."""
        if seq.remaining_work_s > rest_s:
            return False
        if not held:
            return True
        level = min([other.request.priority for other in held])
        if seq.request.priority != level or self._policy.is_by_deadline:
            return seq.request.priority <= level
        priority = self._policy.priority
        return priority(seq).at(now_s) < min([priority(other).at(now_s) for other in held])

    def _add(
        self, builder: BatchBuilder, seq: Sequence, held: list[Sequence], overdue: Sequence | None,
        rest_s: float, left_s: float, now_s: float,
    ) -> bool:  # fmt: skip
        packer = self._packer
        if seq.is_waiting and not packer.has_sequence_slot(overdue) or (plan := packer.plan(seq)) is None:
            return False
        if plan and packer.is_sooner_behind_another(seq, now_s):
            return False
        parts = self._memory.parts(seq, plan)
        num_tokens = builder.fit(seq, parts)
        if num_tokens <= 0 or num_tokens < seq.num_unscheduled_tokens and seq.triage_s < now_s:
            return False
        total_s = before_s = self.holds_s(step_s(self._cost, builder.slowest_load))
        total_s += builder.extra_s(parts, num_tokens) / self._spp
        extra_s = total_s if builder.is_empty else total_s - before_s
        if total_s > left_s or not self._is_worth_it(seq, num_tokens, extra_s, total_s, held, rest_s, now_s):
            return False
        if plan:
            packer.begin(seq, plan)
        builder.add(PlannedChunk(seq, num_tokens, parts))
        return True

    def _is_worth_it(
        self, seq: Sequence, num_tokens: int, extra_s: float, total_s: float, held: list[Sequence], rest_s: float,
        now_s: float,
    ) -> bool:  # fmt: skip
        """Whether it gains more relative slack than those held lose, and none of these misses its deadline by it."""
        if any(seq.request.priority < other.request.priority for other in held):
            return True
        gain = rest_s * num_tokens / (seq.num_unscheduled_tokens * seq.total_work_s)
        if gain <= extra_s * sum([1.0 / other.total_work_s for other in held]):
            return False
        return not any(0.0 <= slack_s(other, now_s) - rest_s < total_s for other in held)

    def _rest_s(self, flight: SubmittedBatch, now_s: float) -> float:
        """Predicted time that a batch still takes if nothing overtakes it: on the first stage, or on those behind."""
        num_stages = self._spp if flight.has_left_first_stage else 1
        whole_s = num_stages * flight.batch.predicted_s / self._spp
        run_s = now_s - flight.batch.created_s - num_stages * flight.held_s
        return whole_s - run_s if run_s < whole_s else _REST_SHARE * run_s

    def _left_s(self, flight: SubmittedBatch) -> float:
        """For how long a batch may still be held: it keeps the progress share of the time, whatever overtakes it."""
        share = self._config.progress_share
        if not share or not flight.batch.may_be_held:
            return inf
        return (1.0 / share - 1.0) * flight.batch.predicted_s / self._spp - flight.held_s
