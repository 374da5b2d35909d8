"""`AsyncLLM`: LLM for code on an event loop, such as a web handler."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from megatron_medha.python_api.growing_output import GrowingOutput
from megatron_medha.python_api.local_service import LocalService
from megatron_medha.python_api.outputs import CompletionOutput, RequestOutput
from megatron_medha.python_api.prompts_and_chats import (
    Conversation,
    PromptInput,
    RequestSource,
    chat_sources,
    source_of,
)
from megatron_medha.python_api.python_options import python_serve_config
from megatron_medha.python_api.request_runs import send_steps
from megatron_medha.python_api.sampling_params import SamplingParams

T = TypeVar("T")


class AsyncLLM:
    """As LLM, for any number of requests at a time, on any event loop.

    The constructor returns at once, and the model loads meanwhile; requests wait for it, and ready() does.
    """

    def __init__(self, checkpoint: str | Path | None = None, **options: Any) -> None:
        self._local = LocalService(python_serve_config(checkpoint, options))
        self._closing = weakref.finalize(self, self._local.close)

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises ConfigError or EngineError where it cannot be."""
        await asyncio.shield(asyncio.wrap_future(self._local.ready))

    async def generate(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """The output of a prompt as it grows: all of it so far after every step; the last one is `finished`.

        A generator that is closed or cancelled early ends the request. request_id: a name for the output.
        """
        source = source_of(prompt, sampling_params, {}, name=request_id)
        async with aclosing(self._received(source, lambda growing, _: growing.output())) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **fields: Any,
    ) -> AsyncIterator[RequestOutput]:
        """The same for the answer to a conversation; fields: as of LLM.chat()."""
        (source,) = chat_sources([messages], sampling_params, fields, name=request_id)
        async with aclosing(self._received(source, lambda growing, _: growing.output())) as outputs:
            async for output in outputs:
                yield output

    async def stream(
        self, prompt: PromptInput | Conversation, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> AsyncIterator[CompletionOutput]:
        """What each step adds, to a prompt or to the answer of a chat: as LLM.stream()."""
        source = source_of(prompt, sampling_params, fields)
        async with aclosing(self._received(source, lambda _, new: new)) as deltas:
            async for delta in deltas:
                yield delta

    async def aclose(self) -> None:
        """End engine and ranks; requests that still run fail."""
        await asyncio.to_thread(self._closing)

    async def __aenter__(self) -> AsyncLLM:
        await self.ready()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _received(
        self, source: RequestSource, take: Callable[[GrowingOutput, CompletionOutput], T]
    ) -> AsyncGenerator[T]:
        """What `take` makes of every step, on the caller's loop."""
        await self.ready()
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

        def put(item: T | BaseException | None) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed, and nobody waits there
                loop.call_soon_threadsafe(items.put_nowait, item)

        future = self._local.submit(send_steps(self._local, source, take, put))
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()
