"""Which waiting prompts an elastic system begins: LoongServe's dispatching rules, first come first served at heart."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.ring_cost import RingCost


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    """Limits; the defaults are those of LoongServe's server."""

    max_prefill_s: float = 0.5      # of a batch of several prompts; a single one may take any time
    decode_round_s: float = 0.03    # assumed for the wait until decodes end
    max_out_of_order: int = 10      # admissions in a row in which later prompts may pass an earlier one
    max_sequences: int = 1000       # that run at the same time
    first_answer_tokens: int = 512  # mean length of answers before any has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceUsage:
    """What runs at the moment."""

    num_used_tokens: int        # of KV
    num_promised_tokens: int    # that running answers may still grow by
    num_sequences: int
    output_counts: list[int]    # tokens so far, of each answer


class _DispatchPass:
    """One look through the waiting prompts: two lists that grow, with the sums their prefill times follow from."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.num_tokens = 0
        self.squares = 0.0
        self.inverses = 0.0

    def add(self, request: Request) -> None:
        count = request.num_prompt_tokens
        self.requests.append(request)
        self.num_tokens += count
        self.squares += float(count) ** 2
        self.inverses += 1.0 / count


class PromptDispatcher:
    """Chooses prompts; remembers how often later ones have passed earlier ones, and how long answers are."""

    def __init__(self, rules: AdmissionRules, cost: RingCost, num_instances: int, tokens_per_instance: int) -> None:
        self._rules = rules
        self._cost = cost
        self._num_instances = num_instances
        self._tokens_per_instance = tokens_per_instance
        self._num_out_of_order = 0
        self._num_output_tokens = rules.first_answer_tokens
        self._num_answers = 1

    def learn(self, num_output_tokens: int) -> None:
        """Take note of an answer that has ended."""
        self._num_output_tokens += num_output_tokens
        self._num_answers += 1

    def choose(self, waiting: deque[Request], census: InstanceUsage) -> list[Request]:
        """Take the prompts to begin now out of `waiting`, when no prefill runs.

        In order of arrival, each of
        * begun, if it fits on the instances that decodes could leave to it, and running it there rather than on all
          instances loses less time than the decodes would need to end, and the batch stays short (or it is alone);
        * else undecided: begun after all, pausing decodes, if that delays their tokens less than waiting would delay
          its own; if not, it keeps its place.
        Prompts behind an undecided one may be begun, but only so many admissions in a row.
        """
        rules = self._rules
        capacity = self._num_instances * self._tokens_per_instance
        num_most_idle = self._num_instances + -(census.num_used_tokens) // self._tokens_per_instance
        wait_s = self._wait_s(census)
        loss = sum(1.0 / count for count in census.output_counts)
        may_pass = self._num_out_of_order < rules.max_out_of_order
        chosen, undecided = _DispatchPass(), _DispatchPass()
        num_forced, has_passed = 0, False
        num_left = capacity - census.num_used_tokens - census.num_promised_tokens
        for request in waiting:
            num_tokens = chosen.num_tokens + request.num_prompt_tokens
            if (
                census.num_sequences + len(chosen.requests) >= rules.max_sequences
                or num_tokens + request.max_output_tokens > num_left
            ):
                break  # no memory: nobody passes for want of that
            is_open = not undecided.requests or may_pass
            if is_open and num_most_idle and num_tokens <= num_most_idle * self._tokens_per_instance:
                now_s = self._prefill_s(num_most_idle, chosen, request)
                slower_s = now_s - self._prefill_s(self._num_instances, chosen, request)
                is_short = now_s <= rules.max_prefill_s
                if slower_s <= wait_s and (is_short or not chosen.requests):
                    has_passed |= bool(undecided.requests)
                    chosen.add(request)
                    if not is_short:
                        break  # a long one runs with nobody behind it
                    continue
                is_open = not chosen.requests or is_short
            undecided.add(request)
            forced_s = self._prefill_s(self._num_instances, chosen, *undecided.requests)
            is_short = forced_s <= rules.max_prefill_s
            if forced_s * loss <= wait_s * undecided.inverses and (
                is_short or len(chosen.requests) + len(undecided.requests) == 1
            ):
                num_forced = len(undecided.requests)
            if not is_short and not (is_open and may_pass):
                break  # times only grow: nobody further down could be begun
        taken = [*chosen.requests, *undecided.requests[:num_forced]]
        if taken:
            self._num_out_of_order = self._num_out_of_order + 1 if has_passed else 0
            names = {request.request_id for request in taken}
            kept = [request for request in waiting if request.request_id not in names]
            waiting.clear()
            waiting.extend(kept)
        return taken

    def choose_within(
        self, waiting: deque[Request], census: InstanceUsage, num_instances: int, left_s: float
    ) -> list[Request]:
        """Take those prompts out of `waiting` that so many instances prefill in the time left, in order of arrival."""
        chosen = _DispatchPass()
        num_left = num_instances * self._tokens_per_instance
        num_all_left = (
            self._num_instances * self._tokens_per_instance - census.num_used_tokens - census.num_promised_tokens
        )
        limit_s = min(left_s, self._rules.max_prefill_s)
        for request in waiting:
            num_tokens = chosen.num_tokens + request.num_prompt_tokens + request.max_output_tokens
            if (
                census.num_sequences + len(chosen.requests) < self._rules.max_sequences
                and num_tokens <= min(num_left, num_all_left)
                and self._prefill_s(num_instances, chosen, request) <= (limit_s if chosen.requests else left_s)
            ):
                chosen.add(request)
            elif chosen.requests and chosen.num_tokens > 0 and self._is_full(num_instances, chosen, limit_s):
                break
        if chosen.requests:
            names = {request.request_id for request in chosen.requests}
            kept = [request for request in waiting if request.request_id not in names]
            waiting.clear()
            waiting.extend(kept)
        return chosen.requests

    def _is_full(self, num_instances: int, chosen: _DispatchPass, limit_s: float) -> bool:
        seconds = self._cost.prefill_s(num_instances, chosen.num_tokens, chosen.squares, len(chosen.requests))
        return seconds > 0.9 * limit_s

    def _wait_s(self, census: InstanceUsage) -> float:
        mean = self._num_output_tokens / self._num_answers
        rounds = [max(mean - count, 0.1 * count) for count in census.output_counts]
        return max([10.0, *rounds]) * self._rules.decode_round_s

    def _prefill_s(self, num_instances: int, chosen: _DispatchPass, *more: Request) -> float:
        num_tokens, squares = chosen.num_tokens, chosen.squares
        for request in more:
            num_tokens += request.num_prompt_tokens
            squares += float(request.num_prompt_tokens) ** 2
        return self._cost.prefill_s(num_instances, num_tokens, squares, len(chosen.requests) + len(more))
