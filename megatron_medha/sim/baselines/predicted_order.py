"""Policies of systems that ours is compared with: each orders prompts by what it predicts of them on arrival."""

from __future__ import annotations

import random
from collections.abc import Callable

from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.policies import Policy, Priority
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.sim.baselines.baseline_config import BaselineConfig, OutputLengthSource

_FIRST_MEAN_TOKENS = 256.0  # believed before any completion has ended; forgotten as they do
_LAST_PRIORITY_S = 1e12  # later than any moment of any run


class OutputLengthPredictor:
    """Predicts the lengths of completions, and learns their mean."""

    def __init__(self, lengths: OutputLengthSource, error: float) -> None:
        self._lengths = lengths
        self._error = error
        self._num_tokens = _FIRST_MEAN_TOKENS
        self._num_completions = 1

    def predict(self, request: Request) -> float:
        """Output tokens of this request."""
        match self._lengths:
            case OutputLengthSource.ORACLE:
                return request.max_output_tokens
            case OutputLengthSource.MEAN:
                return min(self._num_tokens / self._num_completions, request.max_output_tokens)
            case OutputLengthSource.NOISY:
                # Seeded by text: the same in every process and on every replay.
                return request.max_output_tokens * random.Random(request.request_id).lognormvariate(0.0, self._error)

    def learn(self, num_output_tokens: int) -> None:
        """Take note of a completion that has ended."""
        self._num_tokens += num_output_tokens
        self._num_completions += 1


class PredictedOrder:
    """The policies ssjf and qlm; a prediction is made when a sequence is first looked at, which is on its arrival.

    ssjf: shortest predicted job first, prefill and completion: speculative shortest-job-first of Qiu et al.
    (arXiv:2404.08509). qlm: who is estimated to meet its deadline, least slack first; behind them, in order of arrival,
    who is not. After QLM (Patke et al., arXiv:2407.00047), which estimates waiting times from the work queued ahead and
    orders the queue for the fewest missed targets.
    """

    def __init__(self, config: BaselineConfig) -> None:
        self.scheduler: Scheduler | None = None  # that goes by it
        self._outputs = OutputLengthPredictor(config.output_lengths, config.output_error)
        self._predicted_s: dict[str, float] = {}  # by request
        priorities: dict[str, Callable[[Sequence], Priority]] = {"ssjf": self._ssjf, "qlm": self._qlm}
        self.policy = Policy(priorities[config.policy], ended=self._ended)

    def _ssjf(self, seq: Sequence) -> Priority:
        output_s = self._predicted_s.get(seq.request_id)
        if output_s is None:
            assert self.scheduler is not None
            output_s = self._outputs.predict(seq.request) * self.scheduler.cost.linear_s(1, 1)
            self._predicted_s[seq.request_id] = output_s
        return Priority(seq.total_work_s + output_s)

    def _qlm(self, seq: Sequence) -> Priority:
        latest_start_s = seq.deadline_s - seq.total_work_s
        if seq.request_id not in self._predicted_s:
            self._predicted_s[seq.request_id] = 0.0  # its place as if it waited for nobody
            self._predicted_s[seq.request_id] = self._wait_s(seq)
        if seq.request.arrival_s + self._predicted_s[seq.request_id] > latest_start_s:
            return Priority(_LAST_PRIORITY_S + seq.request.arrival_s)
        return Priority(latest_start_s)

    def _wait_s(self, seq: Sequence) -> float:
        """Prefill work that goes before this newcomer's."""
        assert self.scheduler is not None
        place = self._qlm(seq).at_zero
        others = [other for other in self.scheduler.sequences if other.is_prefill and other is not seq]
        return sum([other.remaining_work_s for other in others if self._qlm(other).at_zero <= place], 0.0)

    def _ended(self, seq: Sequence) -> None:
        self._predicted_s.pop(seq.request_id, None)
        if seq.status is Status.FINISHED:
            self._outputs.learn(seq.num_output_tokens)
