"""Whether one more request may come in: places in the queue, each key's share, and whether it would be in time.

Everything here runs on the event loop. What the scheduler rejects (a prompt that never fits) is not decided here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_medha.core.request import Rejection, Request
from megatron_medha.server.api_keys import ApiClient
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.ttft_estimate import TtftEstimator

_SECONDS_PER_MINUTE = 60.0
REJECTION_REASONS = (
    "max_live_requests", "max_waiting_requests", "max_waiting_tokens", "max_live_requests_per_key",
    "max_tokens_per_minute_per_key", "deadline_would_be_missed",
)


@dataclass(slots=True)
class _KeyUsage:
    """What one key has open, and how many tokens it may still have this minute."""

    num_live: int = 0
    num_tokens_left: float = math.inf  # negative: spent ahead, by outputs of unknown length
    as_of_s: float = 0.0


class AdmissionTicket:
    """The places of admitted requests; they come back by close(), however those end."""

    def __init__(
        self, admission: AdmissionControl, account: _KeyUsage, requests: Sequence[Request], num_uncached: Sequence[int]
    ) -> None:
        """num_uncached: tokens of each that must be computed."""
        self.requests = requests
        self._admission = admission
        self._account = account
        self._waiting = dict(enumerate(num_uncached))
        admission.num_live += len(requests)
        admission.num_waiting += len(requests)
        admission.num_waiting_tokens += sum(self._waiting.values())
        account.num_live += len(requests)

    def first_token(self, place: int) -> None:
        """This one of the requests waits no longer."""
        num_tokens = self._waiting.pop(place, None)
        if num_tokens is not None:
            self._admission.num_waiting -= 1
            self._admission.num_waiting_tokens -= num_tokens

    def close(self, num_output_tokens: int) -> None:
        """All have ended with that many tokens together; once only."""
        for place in list(self._waiting):
            self.first_token(place)
        self._admission.num_live -= len(self.requests)
        self._account.num_live -= len(self.requests)
        self._account.num_tokens_left -= num_output_tokens


class AdmissionControl:
    """Counts what is open, over all and by key, and admits or rejects."""

    def __init__(self, now_s: Callable[[], float], forecast: TtftEstimator) -> None:
        self.num_live = 0
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.num_refused: Counter[str] = Counter()
        self._now_s = now_s
        self._forecast = forecast
        self._accounts: dict[str, _KeyUsage] = {}

    def check_capacity(self, config: ServerConfig, num_requests: int) -> Rejection | None:
        """Whether that many more are too many; before any work goes into their prompts."""
        return self._counted(self._without_place(config, num_requests))

    def admit(
        self, config: ServerConfig, client: ApiClient, requests: Sequence[Request]
    ) -> AdmissionTicket | Rejection:
        """Take the places that the requests of one HTTP request need, all or none."""
        account = self._account(config, client)
        num_tokens = sum(request.num_prompt_tokens for request in requests)
        num_uncached = [self._forecast.num_uncached_tokens(request) for request in requests]
        rejection = self._counted(
            self._without_place(config, len(requests))
            or self._over_limits(config, account, len(requests), num_tokens, sum(num_uncached))
            or (self._if_late(requests) if config.reject_late else None)
        )
        if rejection is not None:
            return rejection
        account.num_tokens_left -= num_tokens
        self._forecast.reserve(requests)
        return AdmissionTicket(self, account, requests, num_uncached)

    def _without_place(self, config: ServerConfig, num_requests: int) -> Rejection | None:
        if self.num_live + num_requests > config.max_live_requests:
            return _over(config, "max_live_requests", f"{self.num_live} requests are running or waiting")
        if self.num_waiting + num_requests > config.max_waiting_requests:
            return _over(config, "max_waiting_requests", f"{self.num_waiting} requests wait for their first token")
        return None

    def _over_limits(
        self, config: ServerConfig, account: _KeyUsage, num_requests: int, num_tokens: int, num_uncached: int
    ) -> Rejection | None:
        # A prompt longer than the limit alone must still be possible: with nothing else waiting it gets in.
        if self.num_waiting_tokens and self.num_waiting_tokens + num_uncached > config.max_waiting_tokens:
            what = f"{self.num_waiting_tokens} prompt tokens wait to be computed"
            return _over(config, "max_waiting_tokens", what)
        most = config.max_live_requests_per_key
        if most is not None and account.num_live + num_requests > most:
            what = f"{account.num_live} requests of this key are running or waiting"
            return _over(config, "max_live_requests_per_key", what)
        if (limit := config.max_tokens_per_minute_per_key) is None:
            return None
        # More than a minute's worth at once is possible too, when the minute is unspent; it is paid back by waiting.
        missing = min(num_tokens, limit) - account.num_tokens_left
        if missing <= 0:
            return None
        wait_s = missing * _SECONDS_PER_MINUTE / limit
        message = f"this key may use {limit} tokens a minute; {num_tokens} more are possible in {wait_s:.0f} s"
        return Rejection(reason="max_tokens_per_minute_per_key", message=message, retry_after_s=wait_s)

    def _if_late(self, requests: Sequence[Request]) -> Rejection | None:
        predicted = self._forecast.predict(requests)
        if predicted is None or predicted.ttft_s <= predicted.target_s:
            return None
        return Rejection(
            reason="deadline_would_be_missed",
            message=f"the first token is predicted {predicted.ttft_s:.2f} s after arrival, {predicted.target_s:.2f} s "
            f"are allowed; {predicted.ahead_s:.2f} s of work are due before it",
            retry_after_s=predicted.ttft_s - predicted.target_s,
            predicted_ttft_s=predicted.ttft_s,
        )

    def _account(self, config: ServerConfig, client: ApiClient) -> _KeyUsage:
        account = self._accounts.setdefault(client.name, _KeyUsage())
        now_s, limit = self._now_s(), config.max_tokens_per_minute_per_key
        if limit is None:
            account.num_tokens_left = math.inf
        else:
            earned = (now_s - account.as_of_s) * limit / _SECONDS_PER_MINUTE
            account.num_tokens_left = min(account.num_tokens_left + earned, float(limit))
        account.as_of_s = now_s
        return account

    def _counted(self, rejection: Rejection | None) -> Rejection | None:
        if rejection is not None:
            self.num_refused[rejection.reason] += 1
        return rejection


def _over(config: ServerConfig, name: str, what: str) -> Rejection:
    message = f"{what}, the limit is {getattr(config, name)} (server.{name})"
    return Rejection(reason=name, message=message, retry_after_s=config.retry_after_s)
