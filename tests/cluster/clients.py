"""A client of an engine for tests, and how to wait for what an engine does."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from megatron_medha.core.kv.prefix_keys import GranuleKeys, root_key
from megatron_medha.core.ports import Delivery, EngineClient, EnginePhase, ErrorDelivery, TokenDelivery
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling

_KEY_ROOT = root_key(b"of these tests")
TIMEOUT_S = 180.0  # for starts of real ranks on a busy machine


class Client:
    """Everything the engine delivered, by request, with a way to wait for it."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self.deliveries: dict[str, list[Delivery]] = {}
        self._changed = threading.Condition()
        engine.start(self._take)

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        with self._changed:
            for delivery in deliveries:
                self.deliveries.setdefault(delivery.request_id, []).append(delivery)
            self._changed.notify_all()

    def send(
        self, request_id: str, prompt: Sequence[int], num_outputs: int, *, is_cached: bool = False,
        session_id: str = "", **sampling: Any,
    ) -> None:  # fmt: skip
        """is_cached: it takes part in the prefix cache, where there is one."""
        token_ids, keys, prefix_keys = array("i", prompt), None, b""
        facts = self.engine.facts
        if is_cached and facts is not None and facts.granule_tokens is not None:
            keys = GranuleKeys(_KEY_ROOT, facts.granule_tokens)
            prefix_keys = keys.extend(token_ids)
        request = Request(
            request_id=request_id,
            num_prompt_tokens=len(prompt),
            max_output_tokens=num_outputs,
            arrival_s=self.engine.now_s(),
            prefix_keys=prefix_keys,
            session_id=session_id,
        )
        parameters = {"max_output_tokens": num_outputs, "temperature": 0.0, "seed": 1, **sampling}
        self.engine.submit(request, token_ids, Sampling(**parameters), keys)

    def wait(self, request_id: str, num_deliveries: int | None = None) -> list[Delivery]:
        """Until the request has ended, or that many deliveries have come."""

        def is_there() -> bool:
            got = self.deliveries.get(request_id, [])
            if num_deliveries is not None and len(got) >= num_deliveries:
                return True
            return bool(got) and (isinstance(got[-1], ErrorDelivery) or got[-1].finish_reason is not None)

        with self._changed:
            assert self._changed.wait_for(is_there, TIMEOUT_S), f"{request_id}: {self.deliveries.get(request_id)}"
            return list(self.deliveries[request_id])

    def wait_for_tokens(self, num_tokens: int) -> None:
        """Until that many deliveries have come over all requests."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(map(len, self.deliveries.values())) >= num_tokens, TIMEOUT_S
            ), self.engine.status

    def tokens(self, request_id: str) -> list[int]:
        got = self.wait(request_id)
        assert all(isinstance(delivery, TokenDelivery) for delivery in got), got
        return [delivery.token_id for delivery in got]


def wait_until(is_true: Callable[[], bool], what: object = None) -> None:
    """Look at what nobody announces until it is so."""
    done = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.02)):
        if is_true():
            return
        done.wait(0.02)
    raise AssertionError(f"it never came to pass: {what() if callable(what) else what}")


def wait_until_ready(engine: EngineClient) -> None:
    """Until it no longer loads; it must be ready then."""
    wait_until(lambda: engine.status.phase is not EnginePhase.LOADING)
    assert engine.status.phase is EnginePhase.READY, engine.status
