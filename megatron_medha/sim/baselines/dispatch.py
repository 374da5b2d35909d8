"""Which waiting prompts an elastic system begins: LoongServe's dispatching rules, first come first served at heart."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.instance_system import MAX_PREFILL_S, MAX_SEQUENCES
from megatron_medha.sim.baselines.ring_cost import RingCost

_DECODE_ROUND_S = 0.03       # assumed for the wait until decodes end
_MAX_OUT_OF_ORDER = 10       # admissions in a row in which later prompts may pass an earlier one
_FIRST_OUTPUT_TOKENS = 512   # mean length of completions before any has ended
_FULL_SHARE = 0.9            # of the time limit, from which on no further prompt is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceUsage:
    """What runs at the moment."""

    num_used_tokens: int        # of KV
    num_promised_tokens: int    # that running completions may still grow by
    num_sequences: int
    output_counts: list[int]    # tokens so far, of each completion


def delay_weight(prompts: Sequence[Request]) -> float:
    """What a second's delay of these prompts costs: seconds per prompt token, LoongServe's normalised latency."""
    return sum(1.0 / request.num_prompt_tokens for request in prompts)


class PromptDispatcher:
    """Chooses prompts; counts how often later ones have passed earlier ones, and learns the mean completion length."""

    def __init__(self, cost: RingCost, num_instances: int, tokens_per_instance: int) -> None:
        self._cost = cost
        self._num_instances = num_instances
        self._tokens_per_instance = tokens_per_instance
        self._num_out_of_order = 0
        self._num_output_tokens = _FIRST_OUTPUT_TOKENS
        self._num_completions = 1

    def learn(self, num_output_tokens: int) -> None:
        """Take note of a completion that has ended."""
        self._num_output_tokens += num_output_tokens
        self._num_completions += 1

    def choose(self, waiting: deque[Request], usage: InstanceUsage) -> list[Request]:
        """Take the prompts to begin now out of `waiting`, when no prefill runs.

        In order of arrival, each of
        * begun, if it fits on the instances that decodes could leave to it, and running it there rather than on all
          instances loses less time than the decodes would need to end, and the batch stays short (or it is alone);
        * else undecided: begun after all, pausing decodes, if that delays their tokens less than waiting would delay
          its own; if not, it keeps its place.
        Prompts behind an undecided one may be begun, but only so many admissions in a row.
        """
        prompts_s, num_left = self._cost.prompts_s, self._num_left(usage)
        num_most_idle = self._num_instances - -(-usage.num_used_tokens // self._tokens_per_instance)
        wait_s = self._wait_s(usage)
        loss = sum(1.0 / count for count in usage.output_counts)
        may_pass = self._num_out_of_order < _MAX_OUT_OF_ORDER
        chosen: list[Request] = []
        undecided: list[Request] = []
        num_forced, has_passed = 0, False
        for request in waiting:
            begun = [*chosen, request]
            num_tokens = sum(one.num_prompt_tokens for one in begun)
            if usage.num_sequences + len(begun) > MAX_SEQUENCES or num_tokens + request.max_output_tokens > num_left:
                break  # no memory: nobody passes for want of that
            is_open = not undecided or may_pass
            if is_open and num_most_idle and num_tokens <= num_most_idle * self._tokens_per_instance:
                now_s = prompts_s(num_most_idle, begun)
                is_short = now_s <= MAX_PREFILL_S
                if now_s - prompts_s(self._num_instances, begun) <= wait_s and (is_short or not chosen):
                    has_passed |= bool(undecided)
                    chosen = begun
                    if not is_short:
                        break  # a long one runs with nobody behind it
                    continue
                is_open = not chosen or is_short
            undecided.append(request)
            num_all = len(chosen) + len(undecided)
            forced_s = prompts_s(self._num_instances, [*chosen, *undecided])
            is_short = forced_s <= MAX_PREFILL_S
            if forced_s * loss <= wait_s * delay_weight(undecided) and (is_short or num_all == 1):
                num_forced = len(undecided)
            if not is_short and not (is_open and may_pass):
                break  # times only grow: nobody further down could be begun
        taken = [*chosen, *undecided[:num_forced]]
        if taken:
            self._num_out_of_order = self._num_out_of_order + 1 if has_passed else 0
            _take_out(waiting, taken)
        return taken

    def choose_within(
        self, waiting: deque[Request], usage: InstanceUsage, num_instances: int, left_s: float
    ) -> list[Request]:
        """Take those prompts out of `waiting` that so many instances prefill in the time left, in order of arrival."""
        chosen: list[Request] = []
        num_left = min(num_instances * self._tokens_per_instance, self._num_left(usage))
        limit_s = min(left_s, MAX_PREFILL_S)
        for request in waiting:
            begun = [*chosen, request]
            if (
                usage.num_sequences + len(begun) <= MAX_SEQUENCES
                and sum(one.num_prompt_tokens for one in begun) + request.max_output_tokens <= num_left
                and self._cost.prompts_s(num_instances, begun) <= (limit_s if chosen else left_s)
            ):
                chosen = begun
            elif chosen and self._cost.prompts_s(num_instances, chosen) > _FULL_SHARE * limit_s:
                break
        if chosen:
            _take_out(waiting, chosen)
        return chosen

    def _num_left(self, usage: InstanceUsage) -> int:
        capacity = self._num_instances * self._tokens_per_instance
        return capacity - usage.num_used_tokens - usage.num_promised_tokens

    def _wait_s(self, usage: InstanceUsage) -> float:
        mean = self._num_output_tokens / self._num_completions
        return max([10.0, *(max(mean - count, 0.1 * count) for count in usage.output_counts)]) * _DECODE_ROUND_S


def _take_out(waiting: deque[Request], taken: list[Request]) -> None:
    names = {request.request_id for request in taken}
    kept = [request for request in waiting if request.request_id not in names]
    waiting.clear()
    waiting.extend(kept)
