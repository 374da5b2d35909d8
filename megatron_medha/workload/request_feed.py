"""Where the requests of a run come from as it goes: by the clock, or each after another has ended."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Protocol

from megatron_medha.core.request import Request
from megatron_medha.workload.key_chain import KeyChain, TextSpan


class RequestFeed(Protocol):
    """Requests in order of arrival. The next one may depend on which have ended."""

    next_s: float                # arrival of the next request; inf: none comes unless another ends
    granule_tokens: int | None   # of requests with prefix keys; None: they have none

    def pop(self) -> Request:
        """The next request."""

    def ended(self, request_id: str, now_s: float, is_finished: bool) -> None:
        """A request has ended now, with all its tokens or without."""

    def filled_keys(self, request_id: str, num_tokens: int) -> bytes:
        """Keys of the granules that are full with the first num_tokens of a live request's prompt and output.

        Without those of its prompt and those that this has given before.
        """


class OpenLoop:
    """A RequestFeed of requests that come when they come.

    Nothing continues their outputs: each is a text of its own.
    """

    def __init__(self, requests: Iterable[Request], granule_tokens: int | None = None) -> None:
        self.granule_tokens = granule_tokens
        self._requests = iter(requests)
        self._chains: dict[str, KeyChain] = {}
        self._next: Request | None = None
        self.next_s = inf
        self._advance()

    def pop(self) -> Request:
        """See RequestFeed."""
        request = self._next
        assert request is not None, "no request is left"
        if self.granule_tokens is not None and request.prefix_keys:
            self._chains[request.request_id] = KeyChain.after(
                request.prefix_keys, request.num_prompt_tokens, self.granule_tokens, request.request_id
            )
        self._advance()
        return request

    def ended(self, request_id: str, now_s: float, is_finished: bool) -> None:
        """See RequestFeed."""
        self._chains.pop(request_id, None)

    def filled_keys(self, request_id: str, num_tokens: int) -> bytes:
        """See RequestFeed."""
        chain = self._chains.get(request_id)
        return b"" if chain is None else grown(chain, request_id, num_tokens)

    def _advance(self) -> None:
        self._next = next(self._requests, None)
        self.next_s = inf if self._next is None else self._next.arrival_s


def grown(chain: KeyChain, text: str, num_tokens: int) -> bytes:
    """The keys that a chain gets where it grows to so many tokens of a text that begins anywhere."""
    return chain.append(TextSpan(text, chain.num_tokens, num_tokens - chain.num_tokens))
