"""What all routes share: engine, tokenizer, limits; and the answers to "is it up" and "is this model served"."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from megatron_medha.engine.ports import EngineClient, EngineFacts, EnginePhase, EngineStatus
from megatron_medha.server.config import ServerConfig
from megatron_medha.server.errors import ApiError
from megatron_medha.server.metrics import Metrics
from megatron_medha.server.streams import EngineLost, Streams
from megatron_medha.server.tokens import Tokenizer

T = TypeVar("T")

# Text up to this long is encoded on the event loop: about a millisecond, less than what others wait anyway.
MAX_INLINE_CHARS = 2_000


# While ranks come up again, requests wait for them: a few seconds later they run, which beats asking again.
_TAKES_REQUESTS = (EnginePhase.READY, EnginePhase.RECOVERING)


@dataclass(frozen=True, slots=True)
class Ready:
    """What is known once requests can be taken."""

    facts: EngineFacts
    tokenizer: Tokenizer


class Service:
    """The server without its routes."""

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer | Future[Tokenizer], config: ServerConfig, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.streams = Streams(engine.now_s)
        self.started_unix_s = int(time.time())
        self._tokenizer = tokenizer
        self._text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and listen to it."""
        self.streams.attach(asyncio.get_running_loop())
        self.engine.start(self.streams.deliver)
        self._watch = asyncio.create_task(self._watch_engine())

    async def stop(self) -> None:
        """Stop the engine; requests still open end with an error."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self.engine.stop, self.config.stop_timeout_s)
        self.streams.end_all(lambda: EngineLost("the server is shutting down"))
        self._text_threads.shutdown(wait=False, cancel_futures=True)

    @property
    def status(self) -> EngineStatus:
        """The engine's status, or the tokenizer's where that is what is missing."""
        status = self.engine.status
        if status.phase not in _TAKES_REQUESTS or not isinstance(self._tokenizer, Future):
            return status
        if not self._tokenizer.done():
            return EngineStatus(EnginePhase.LOADING, "loading the tokenizer", status.fraction)
        error = self._tokenizer.exception()
        return status if error is None else EngineStatus(EnginePhase.FAILED, f"tokenizer: {error}")

    def ready(self) -> Ready:
        """What routes work with; ApiError 503 while loading and once failed."""
        status = self.status
        facts = self.engine.facts
        match status.phase:
            case EnginePhase.READY | EnginePhase.RECOVERING if facts is not None:
                tokenizer = self._tokenizer.result() if isinstance(self._tokenizer, Future) else self._tokenizer
                return Ready(facts, tokenizer)
            case EnginePhase.FAILED:
                raise ApiError(503, f"the engine has failed: {status.detail}", code="engine_failed")
            case EnginePhase.STOPPED:
                raise ApiError(503, "the server is shutting down", code="engine_stopped")
            case _:
                percent = f"{100 * status.fraction:.0f}%"
                detail = f": {status.detail}" if status.detail else ""
                raise ApiError(
                    503,
                    f"the model is loading, {percent}{detail}",
                    code="model_loading",
                    headers={"retry-after": str(self.config.retry_after_s)},
                )

    def check_capacity(self, num_choices: int) -> None:
        """ApiError 429 if that many more sub-requests are too many."""
        if len(self.streams) + num_choices > self.config.max_live_requests:
            raise ApiError(
                429,
                f"{len(self.streams)} requests are running or waiting, the limit is {self.config.max_live_requests}",
                code="too_many_requests",
                headers={"retry-after": str(self.config.retry_after_s)},
            )

    def served_names(self) -> tuple[str, ...]:
        """Names clients may use; empty before the checkpoint's own name is known."""
        if self.config.served_model_names:
            return self.config.served_model_names
        facts = self.engine.facts
        return (facts.shape.name,) if facts is not None else ()

    def model_name(self, asked: str | None) -> str:
        """The name to answer with; ApiError 404 for a model that is not served."""
        names = self.served_names()
        if asked is None:
            return names[0] if names else ""
        if asked not in names:
            served = ", ".join(names) or "none yet"
            raise ApiError(
                404, f"the model `{asked}` does not exist; served: {served}", param="model", code="model_not_found"
            )
        return asked

    def is_key_right(self, authorization: str | None) -> bool:
        """Whether the Authorization header carries the key, if one is needed; in constant time."""
        if self.config.api_key is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        is_same = hmac.compare_digest(key.strip().encode("utf-8", "replace"), self.config.api_key.encode())
        return is_same and scheme.lower() == "bearer"

    async def work_on_text(self, num_chars: int, work: Callable[[], T]) -> T:
        """Run tokenizer or template work: here if the text is short, else on a thread."""
        if num_chars <= MAX_INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, work)

    async def _watch_engine(self) -> None:
        # The engine tells each request how it ended. Should it die without a word, nobody waits for ever.
        while self.engine.status.phase not in (EnginePhase.FAILED, EnginePhase.STOPPED):
            await asyncio.sleep(self.config.engine_check_s)
        await asyncio.sleep(0)  # deliveries already on their way tell more than we can
        detail = self.engine.status.detail or self.engine.status.phase.value
        while True:
            self.streams.end_all(lambda: EngineLost(f"the engine has failed: {detail}"))
            await asyncio.sleep(self.config.engine_check_s)
