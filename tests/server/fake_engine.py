"""An engine without a model, for tests of the server: tokens follow a rule, and time is the test's to give."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_medha.core.batch import FinishReason
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import (
    Delivery,
    EngineFacts,
    EngineLoad,
    EnginePhase,
    EngineStatus,
    ErrorDelivery,
    ReplicaState,
    Sink,
    TokenDelivery,
)
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling, TokenLogprobs

WAIT_S = 120.0  # for what comes at once unless the machine is busy

Rule = Callable[[Request, Sequence[int], Sampling, int], int]


def echo_prompt(request: Request, prompt: Sequence[int], sampling: Sampling, place: int) -> int:
    """Output token i is prompt token i, over and over."""
    return prompt[place % len(prompt)]


def say(token_ids: Sequence[int]) -> Rule:
    """The same output for every prompt, over and over."""
    return lambda request, prompt, sampling, place: token_ids[place % len(token_ids)]


@dataclass
class Live:
    """A request the fake is working on."""

    request: Request
    prompt: array[int]
    sampling: Sampling
    keys: GranuleKeys | None = None
    num_output: int = 0


@dataclass
class FakeEngine:
    """Gives one token to every live request per step, on a thread of its own.

    Steps run freely, or while is_stepped is set only as the test grants them with step().
    """

    rule: Rule = echo_prompt
    vocab_size: int = 300
    max_request_tokens: int = 1000
    stop_token_ids: tuple[int, ...] = (257,)
    is_stepped: bool = False
    granule_tokens: int | None = None
    num_cached: Callable[[Request], int] = lambda request: 0
    reject_with: tuple[str, bool] | None = None  # (message, is_client_fault) for every request
    status: EngineStatus = EngineStatus(EnginePhase.READY)
    submitted: list[Live] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._live: dict[str, Live] = {}
        self._granted = 0
        self._is_stopping = False
        self._sink: Sink | None = None
        self._subscribers: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name="fake-engine")
        self.step_batch: list[Delivery] = []

    def on_status(self, on_change: Callable[[], None]) -> None:
        """Call it when the engine fails or stops."""
        self._subscribers.append(on_change)

    def _end(self, status: EngineStatus) -> None:
        self.status = status
        for on_change in self._subscribers:
            on_change()

    @property
    def facts(self) -> EngineFacts | None:
        """What is known; None until ready."""
        if self.status.phase is EnginePhase.LOADING:
            return None
        shape = ModelShape(
            name="fake-model", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, num_kv_heads=1,
            head_dim=8, vocab_size=self.vocab_size, max_context_len=self.max_request_tokens,
        )
        return EngineFacts(
            shape=shape, num_blocks=100, block_size=16, max_request_tokens=self.max_request_tokens,
            stop_token_ids=self.stop_token_ids, device="fake", granule_tokens=self.granule_tokens,
        )

    @property
    def load(self) -> EngineLoad:
        """Every live request counts as decoding."""
        num_live = len(self._live)
        return EngineLoad(
            num_waiting=0, num_prefilling=0, num_decoding=num_live, num_free_blocks=100 - num_live,
            num_blocks=100, num_waiting_tokens=0,
        )

    @property
    def replicas(self) -> Sequence[ReplicaState]:
        """One."""
        return (ReplicaState(self.status, self.load),)

    def now_s(self) -> float:
        """A monotonic clock."""
        return time.monotonic()

    def start(self, sink: Sink) -> None:
        """Start the thread."""
        self._sink = sink
        self._thread.start()

    def submit(
        self, request: Request, token_ids: array[int], sampling: Sampling, keys: GranuleKeys | None = None
    ) -> None:
        """Take a request."""
        assert type(token_ids) is array and token_ids.typecode == "i" and len(token_ids) == request.num_prompt_tokens
        with self._changed:
            assert all(live.request.request_id != request.request_id for live in self.submitted), "id used twice"
            live = Live(request, token_ids, sampling, keys)
            self._live[request.request_id] = live
            self.submitted.append(live)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        with self._changed:
            self.aborted.append(request_id)
            self._live.pop(request_id, None)
            self._changed.notify_all()

    def stop(self, timeout_s: float) -> None:
        """End the thread; what is alive gets an error."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._end(EngineStatus(EnginePhase.STOPPED))

    # what tests do

    def step(self, num_steps: int = 1) -> None:
        """Grant steps to an engine that is_stepped."""
        with self._changed:
            self._granted += num_steps
            self._changed.notify_all()

    def fail(self, why: str, *, is_silent: bool = False) -> None:
        """The engine dies; silently: without a word to those who wait."""
        with self._changed:
            dead = list(self._live)
            self._live.clear()
            self._changed.notify_all()
        if not is_silent and dead:
            assert self._sink is not None
            self._sink([ErrorDelivery(request_id, why, False) for request_id in dead])
        self._end(EngineStatus(EnginePhase.FAILED, why))

    def wait_for_submitted(self, num_requests: int) -> None:
        """Wait until that many requests have ever arrived."""
        self._wait(lambda: len(self.submitted) >= num_requests, f"{num_requests} requests")

    def wait_until_idle(self) -> None:
        """Wait until no request is alive."""
        self._wait(lambda: not self._live, "no live request")

    def wait_for_aborts(self, num_aborts: int) -> None:
        """Wait until that many aborts were asked for."""
        self._wait(lambda: len(self.aborted) >= num_aborts, f"{num_aborts} aborts")

    def _wait(self, is_true: Callable[[], bool], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(is_true, WAIT_S), f"{what} did not come within {WAIT_S} s"

    def _can_step(self) -> bool:
        return bool(self._live) and (not self.is_stepped or self._granted > 0)

    def _run(self) -> None:
        assert self._sink is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._can_step())
                if self._is_stopping:
                    dead = list(self._live)
                    self._live.clear()
                    deliveries: list[Delivery] = [ErrorDelivery(rid, "the engine has stopped", False) for rid in dead]
                else:
                    self._granted -= 1 if self.is_stepped else 0
                    deliveries = self._step()
                self._changed.notify_all()
            self._sink(deliveries)
            if self._is_stopping:
                return

    def _step(self) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for live in list(self._live.values()):
            request_id = live.request.request_id
            if self.reject_with is not None:
                del self._live[request_id]
                deliveries.append(ErrorDelivery(request_id, *self.reject_with))
                continue
            deliveries.append(self._token(live))
            if deliveries[-1].finish_reason is not None:
                del self._live[request_id]
        return deliveries

    def _token(self, live: Live) -> TokenDelivery:
        sampling, prompt = live.sampling, live.prompt
        token_id = self.rule(live.request, prompt, sampling, live.num_output)
        live.num_output += 1
        reason = None
        if token_id in sampling.stop_token_ids and live.num_output > sampling.min_output_tokens:
            reason = FinishReason.STOP
        elif live.num_output >= live.request.max_output_tokens:
            reason = FinishReason.LENGTH
        logprobs = prompt_logprobs = None
        if sampling.num_logprobs is not None:
            logprobs = self._logprobs(token_id, sampling.num_logprobs)
        if sampling.num_prompt_logprobs is not None and live.num_output == 1:
            count = sampling.num_prompt_logprobs
            prompt_logprobs = tuple(self._logprobs(token, count) for token in prompt[1:])
        num_cached = self.num_cached(live.request) if live.num_output == 1 else 0
        return TokenDelivery(live.request.request_id, token_id, reason, logprobs, prompt_logprobs, num_cached)

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        # Even tokens are the best at their position, odd ones the second.
        best = token_id if token_id % 2 == 0 else token_id - 1
        top = [(best + 1 - abs(place), -0.1 - place / 3) for place in range(1, num_top + 1)]
        top[:1] = [(best, -1 / 3)] if num_top else []
        logprob = -1 / 3 if token_id == best else -2 / 3
        return TokenLogprobs(token_id, logprob, 1 if token_id == best else 2, tuple(top))
