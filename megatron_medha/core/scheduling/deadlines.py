"""When the first token of a prefill is due, and how much work is left of it, by what the cost model believes.

Work is that of tokens whose KV is not in the prefix cache.
"""

from __future__ import annotations

from math import inf

from megatron_medha.core.cost.step_cost import CostModel
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import PrefillTimes, num_step_tokens
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

_MAX_MARGIN_SHARE = 0.8  # of a deadline
_NO_BUDGET_S = 1e9


class Deadlines:
    """Sets work and deadlines of sequences."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, spp: int, max_request_tokens: int) -> None:
        self._config = config
        self._rule = config.chunk_rule
        self._cost = cost
        self._spp = spp
        self._max_request_tokens = max_request_tokens
        self._predict()

    @property
    def num_step_tokens(self) -> int:
        """Tokens of a prompt that fit into a step with nothing else."""
        return self._num_step_tokens

    def refresh(self) -> bool:
        """Follow the cost model; False if it believes what it did."""
        if self._times.revision == self._cost.revision:
            return False
        self._predict()
        return True

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted time of a whole prefill, alone: w_total."""
        return self._times.prefill_s(num_tokens) / self._spp

    def decode_s(self, num_context_tokens: int) -> float:
        """Predicted time in which a step's decodes read so many tokens of context."""
        return self._cost.decode_attention_s(num_context_tokens)

    def work_s(self, num_tokens: int, num_cached_tokens: int) -> float:
        """Predicted time of a prefill, alone, that begins behind cached tokens.

        It is at least that of as many tokens with nothing before them: a step has costs of its own, however short.
        """
        prefill_s = self._times.prefill_s
        if not num_cached_tokens:
            return prefill_s(num_tokens) / self._spp
        behind_s = prefill_s(num_tokens) - prefill_s(num_cached_tokens)
        return max(behind_s, prefill_s(num_tokens - num_cached_tokens)) / self._spp

    def ttft_target_s(self, request: Request, total_work_s: float) -> float:
        """Seconds from arrival in which the first token is due: the request's own, its class's, or ours."""
        if request.ttft_slo_s is not None:
            return request.ttft_slo_s
        multiplier, least_s = request.deadline_multiplier, request.min_deadline_s
        return max(
            (self._config.deadline_multiplier if multiplier is None else multiplier) * total_work_s,
            self._config.min_deadline_s if least_s is None else least_s,
        )

    def latest_begin_s(self, seq: Sequence, num_cached_tokens: int) -> tuple[float, float]:
        """When a prefill behind cached tokens has to begin to be in time, with its margin; and its work."""
        work_s = self.work_s(seq.num_known_tokens, num_cached_tokens)
        target_s = self.ttft_target_s(seq.request, work_s)
        return seq.request.arrival_s + target_s - work_s - self._margin_s(target_s), work_s

    def begin(self, seq: Sequence) -> None:
        """Set work and deadline of a request that has just arrived."""
        request = seq.request
        seq.num_promised_tokens = seq.num_cached_tokens
        seq.total_work_s = seq.remaining_work_s = total_s = self.work_s(seq.num_known_tokens, seq.num_cached_tokens)
        target_s = self.ttft_target_s(request, total_s)
        seq.deadline_s = request.arrival_s + target_s
        seq.triage_deadline_s = self._triage_deadline_s(seq, target_s, total_s)
        seq.margin_s = self._margin_s(target_s)

    def follow(self, seq: Sequence) -> bool:
        """What is left of a prefill, and what all of it is, by the belief of now; whether its deadline moved.

        A deadline that was derived from the prompt's own work follows the belief: a first estimate that was half the
        truth would make a long prompt look overdue through no fault of anybody, and others would wait for it.
        """
        times = self._times
        whole_s = times.prefill_s(seq.num_known_tokens)
        seq.remaining_work_s = max(0.0, (whole_s - times.prefill_s(seq.num_scheduled_tokens)) / self._spp)
        return self._follow_total(seq)

    def rematch(self, seq: Sequence) -> bool:
        """Another part of a waiting sequence is cached than before; whether its deadline moved.

        Where it is more, that is progress, and the deadline stays. Where it is less than when it arrived, the deadline
        moves to what the work then is.
        """
        seq.num_promised_tokens = min(seq.num_promised_tokens, seq.num_cached_tokens)
        seq.remaining_work_s = left_s = self.work_s(seq.num_known_tokens, seq.num_cached_tokens)
        if seq.num_promised_tokens == seq.num_cached_tokens:
            return self._set_total(seq, left_s)
        return self._follow_total(seq)

    def _follow_total(self, seq: Sequence) -> bool:
        return self._set_total(seq, self.work_s(seq.num_known_tokens, seq.num_promised_tokens))

    def _set_total(self, seq: Sequence, total_s: float) -> bool:
        if total_s == seq.total_work_s:
            return False
        seq.total_work_s = total_s
        target_s = self.ttft_target_s(seq.request, total_s)
        if not seq.num_output_tokens:
            seq.triage_deadline_s = self._triage_deadline_s(seq, target_s, total_s)
        if seq.request.ttft_slo_s is not None:
            return False
        seq.deadline_s, seq.margin_s = seq.request.arrival_s + target_s, self._margin_s(target_s)
        return True

    @property
    def fixed_s(self) -> float:
        """What a step costs whatever it computes."""
        return self._cost.linear_s(1, 1)

    def feasible_s(self, budget_s: float) -> float:
        """A step budget that can be kept.

        One that the fixed costs of a step fill cannot be kept by any chunk size; tiles would then pay a step's
        overhead each. Twice those costs is the least at which half of the time goes into tokens.
        """
        return max(budget_s, 2.0 * self.fixed_s)

    def _triage_deadline_s(self, seq: Sequence, target_s: float, total_work_s: float) -> float:
        """The deadline that triage goes by: its own, or the one that its work alone would give it, if that is later.

        So a prompt that asks for what cannot be done is not put behind those that ask for nothing. Turns of sessions
        are never given up: those that wait are no longer than those that come, and to let these pass helps nobody.
        """
        if not self._config.has_triage or seq.is_mostly_cached:
            return inf
        return seq.request.arrival_s + max(target_s, self._config.deadline_multiplier * total_work_s)

    def _margin_s(self, target_s: float) -> float:
        """The safety margin before a target; most of the target if that is shorter than ten steps."""
        steps_s = self._config.slack_margin_steps * self.feasible_s(self._config.step_budget_s)
        return min(steps_s, _MAX_MARGIN_SHARE * target_s)

    def _predict(self) -> None:
        """Tables by the cost model of now. Where batches can be held, a prompt alone is computed in large chunks."""
        budget_s = self.feasible_s(self._config.step_budget_s)
        rule, cost, max_tokens = self._rule, self._cost, self._max_request_tokens
        if self._config.interruptible is True:
            self._times = PrefillTimes(rule, cost, _NO_BUDGET_S, max_tokens)
            self._num_step_tokens = num_step_tokens(rule, cost, budget_s)
        else:
            self._times = PrefillTimes(rule, cost, budget_s, max_tokens)
            self._num_step_tokens = self._times.num_step_tokens
