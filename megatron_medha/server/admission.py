"""Whether one more request may come in: places in the queue, each key's share, and whether it would be in time.

Everything here runs on the event loop. What the engine refuses (a prompt that never fits) is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_medha.server.api_keys import Client
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http.http_errors import ApiError, retry_after
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.ttft_estimate import Forecast

_SECONDS_PER_MINUTE = 60.0
REFUSAL_REASONS = (
    "max_live_requests", "max_waiting_requests", "max_waiting_tokens", "max_live_requests_per_key",
    "max_tokens_per_minute_per_key", "deadline_would_be_missed",
)


@dataclass(slots=True)
class _Account:
    """What one key has open, and how many tokens it may still have this minute."""

    num_live: int = 0
    num_tokens_left: float = math.inf  # negative: spent ahead, by answers whose length nobody knew
    as_of_s: float = 0.0


class Ticket:
    """An admitted request's places; they come back by close(), however it ends."""

    def __init__(self, admission: Admission, account: _Account, spec: GenerationSpec) -> None:
        self._admission = admission
        self._account = account
        self._num_live = spec.num_choices
        self._waiting = {
            place: len(spec.prompts[place // spec.n].token_ids) for place in range(spec.num_choices)
        }
        admission.num_live += self._num_live
        admission.num_waiting += len(self._waiting)
        admission.num_waiting_tokens += sum(self._waiting.values())
        account.num_live += self._num_live

    def first_token(self, choice_index: int) -> None:
        """This choice waits no longer."""
        num_tokens = self._waiting.pop(choice_index, None)
        if num_tokens is not None:
            self._admission.num_waiting -= 1
            self._admission.num_waiting_tokens -= num_tokens

    def close(self, num_output_tokens: int) -> None:
        """The HTTP request has ended with that many tokens in all; once only."""
        for choice_index in list(self._waiting):
            self.first_token(choice_index)
        self._admission.num_live -= self._num_live
        self._account.num_live -= self._num_live
        self._account.num_tokens_left -= num_output_tokens
        self._num_live = 0


class Admission:
    """Counts what is open, over all and by key, and says no."""

    def __init__(self, now_s: Callable[[], float], forecast: Forecast) -> None:
        self.num_live = 0
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.num_refused: dict[str, int] = {}
        self._now_s = now_s
        self._forecast = forecast
        self._accounts: dict[str, _Account] = {}

    def check_places(self, config: ServerConfig, num_choices: int) -> None:
        """ApiError 429 if that many more sub-requests are too many; before any work goes into their prompts."""
        self._check_count("max_live_requests", self.num_live + num_choices, config.max_live_requests, config,
                          f"{self.num_live} requests are running or waiting")
        self._check_count("max_waiting_requests", self.num_waiting + num_choices, config.max_waiting_requests, config,
                          f"{self.num_waiting} requests wait for their first token")

    def admit(self, config: ServerConfig, client: Client, spec: GenerationSpec) -> Ticket:
        """Take the places a request needs. ApiError 429 with Retry-After if it cannot have them now."""
        self.check_places(config, spec.num_choices)
        num_tokens = sum(len(prompt.token_ids) for prompt in spec.prompts) * spec.n
        # A prompt longer than the limit alone must still be possible: with nothing else waiting it gets in.
        if self.num_waiting_tokens:
            self._check_count("max_waiting_tokens", self.num_waiting_tokens + num_tokens, config.max_waiting_tokens,
                              config, f"{self.num_waiting_tokens} prompt tokens wait to be computed")
        account = self._account(config, client)
        if config.max_live_requests_per_key is not None:
            self._check_count("max_live_requests_per_key", account.num_live + spec.num_choices,
                              config.max_live_requests_per_key, config,
                              f"{account.num_live} requests of this key are running or waiting")
        self._check_tokens_per_minute(config, account, num_tokens)
        if config.refuses_late:
            self._check_in_time(spec)
        account.num_tokens_left -= num_tokens
        self._forecast.count_in(spec)
        return Ticket(self, account, spec)

    def _account(self, config: ServerConfig, client: Client) -> _Account:
        account = self._accounts.setdefault(client.name, _Account())
        now_s, limit = self._now_s(), config.max_tokens_per_minute_per_key
        if limit is None:
            account.num_tokens_left = math.inf
        else:
            earned = (now_s - account.as_of_s) * limit / _SECONDS_PER_MINUTE
            account.num_tokens_left = min(account.num_tokens_left + earned, float(limit))
        account.as_of_s = now_s
        return account

    def _check_tokens_per_minute(self, config: ServerConfig, account: _Account, num_tokens: int) -> None:
        limit = config.max_tokens_per_minute_per_key
        if limit is None:
            return
        # More than a minute's worth at once is possible too, when the minute is unspent; it is paid back by waiting.
        missing = min(num_tokens, limit) - account.num_tokens_left
        if missing > 0:
            wait_s = missing * _SECONDS_PER_MINUTE / limit
            raise self._refusal(
                "max_tokens_per_minute_per_key",
                f"this key may use {limit} tokens a minute; {num_tokens} more are possible in {wait_s:.0f} s",
                wait_s,
            )

    def _check_in_time(self, spec: GenerationSpec) -> None:
        predicted = self._forecast.predict(spec)
        if predicted is None or predicted.ttft_s <= predicted.target_s:
            return
        error = self._refusal(
            "deadline_would_be_missed",
            f"the first token is predicted {predicted.ttft_s:.2f} s after arrival, {predicted.target_s:.2f} s are "
            f"allowed; {predicted.ahead_s:.2f} s of work are due before it",
            predicted.ttft_s - predicted.target_s,
        )
        error.headers["x-predicted-ttft-ms"] = f"{predicted.ttft_s * 1e3:.0f}"
        raise error

    def _check_count(self, name: str, count: int, limit: int, config: ServerConfig, what: str) -> None:
        if count > limit:
            raise self._refusal(name, f"{what}, the limit is {limit} (server.{name})", config.retry_after_s)

    def _refusal(self, reason: str, message: str, retry_after_s: float) -> ApiError:
        self.num_refused[reason] = self.num_refused.get(reason, 0) + 1
        return ApiError(429, message, code=reason.removeprefix("max_"), headers=retry_after(retry_after_s))


