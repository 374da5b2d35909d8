"""Where prompts are rendered and encoded: on the event loop if they are short, else on threads and in processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from megatron_medha.server.http.body_reader import SMALL_BODY_BYTES, BodyBudget
from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.text.chat.chat_template import ChatTemplate
from megatron_medha.text.chat.template_renders import NoRenderProcess, TemplateProcessPool

T = TypeVar("T")
RunBlocking = Callable[..., Coroutine[Any, Any, Any]]  # a function and its arguments, somewhere

# Text up to this long is encoded on the event loop: about a millisecond, less than what others wait anyway.
MAX_INLINE_CHARS = 2_000
# Longer text is work of 0.1 s and more, up to a minute: it waits for its like only.
LONG_TEXT_CHARS = 400_000


class TextWorkers:
    """Threads for the tokenizer and processes for chat templates. Event loop only."""

    def __init__(self, bodies: BodyBudget, renders: TemplateProcessPool | None = None) -> None:
        """bodies: counts work whose client has gone, until it is done. renders: of another owner, who closes them."""
        self.renders = TemplateProcessPool() if renders is None else renders
        self._owns_renders = renders is None
        self._bodies = bodies
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._long_text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="long-text")

    async def close(self, run_blocking: RunBlocking = asyncio.to_thread) -> None:
        """No more work comes."""
        for threads in (self._threads, self._long_text_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._owns_renders:
            await run_blocking(self.renders.close)

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """What tokenizer work on so many characters comes to.

        Work that has not begun when its caller is cancelled never does; what has begun is counted until it is done.
        """
        if num_chars <= MAX_INLINE_CHARS:
            return work()
        threads = self._threads if num_chars <= LONG_TEXT_CHARS else self._long_text_threads
        return await self._wait_for(num_chars, threads.submit(work))

    async def render(
        self, template: ChatTemplate, messages: Iterable[dict[str, Any]], options: dict[str, Any], num_chars: int
    ) -> str:
        """The prompt's text, made in another process: as TemplateProcessPool.submit. ApiError 503 if there is none."""
        try:
            return await self._wait_for(num_chars, self.renders.submit(template, messages, options, num_chars))
        except NoRenderProcess as error:
            wait_s = self._bodies.config().retry_after_s
            raise ApiError(503, str(error), code="no_render_process", retry_after_s=wait_s) from None

    async def _wait_for(self, num_chars: int, working: Future[T]) -> T:
        done = asyncio.wrap_future(working)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            # The caller, who held the body's bytes, is gone.
            working.cancel()
            num_left = num_chars if num_chars > SMALL_BODY_BYTES and not done.done() else 0
            self._bodies.num_bytes += num_left

            def end(_: asyncio.Future[T]) -> None:
                self._bodies.num_bytes -= num_left
                if not done.cancelled():
                    done.exception()  # else asyncio logs it as never retrieved

            done.add_done_callback(end)
            raise
