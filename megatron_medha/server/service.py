"""What all routes share: engine, tokenizer, limits; and the answers to "is it up" and "is this model served"."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EngineClient, EnginePhase, EngineStatus
from megatron_medha.server.admission import Admission
from megatron_medha.server.api_keys import KeyRing
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http.http_errors import ApiError, retry_after
from megatron_medha.server.http.request_body import SMALL_BODY_BYTES
from megatron_medha.server.observe.loop_lag import watch_lag
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.server.observe.request_log import Journal
from megatron_medha.server.observe.tracing import Traces
from megatron_medha.server.output_streams import EngineLost, Streams
from megatron_medha.server.ready import Ready
from megatron_medha.server.recent_items import RecentItems
from megatron_medha.server.server_config import FIXED_FIELDS, ServerConfig
from megatron_medha.server.slo import SloConfig
from megatron_medha.server.tools.structured_output import Grammars
from megatron_medha.text.chat_template import ChatTemplate
from megatron_medha.text.sampling_defaults import OPENAI_DEFAULTS, SamplingDefaults
from megatron_medha.text.template_renders import NoRenderProcess, TemplateRenders
from megatron_medha.text.tokenizer import Tokenizer

T = TypeVar("T")

log = logging.getLogger(__name__)

# Text up to this long is encoded on the event loop: about a millisecond, less than what others wait anyway.
MAX_INLINE_CHARS = 2_000
# Longer text is work of 0.1 s and more, up to a minute: it waits for its like only.
LONG_TEXT_CHARS = 400_000
# What answers that were cut off by a drain get to say so; those that cannot in that time have no reader.
_TELLING_S = 1.0


# While ranks come up again, requests wait for them: a few seconds later they run, which beats asking again.
_TAKES_REQUESTS = (EnginePhase.READY, EnginePhase.RECOVERING)




class HeldBytes:
    """What one request holds in memory before it is admitted: counted against server.max_bodies_bytes until the end."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.num_bytes = 0

    def __enter__(self) -> HeldBytes:
        return self

    def __exit__(self, *_: object) -> None:
        if self.num_bytes > SMALL_BODY_BYTES:
            self._service.num_held_bytes -= self.num_bytes

    def grow_to(self, num_bytes: int) -> None:
        """It is so much now; ApiError 503 if there is no room for that."""
        if num_bytes > SMALL_BODY_BYTES:
            before = self.num_bytes if self.num_bytes > SMALL_BODY_BYTES else 0
            service, num_more = self._service, num_bytes - before
            config = service.config
            if service.num_held_bytes + num_more > config.max_bodies_bytes:
                raise ApiError(
                    503,
                    f"requests that are not admitted yet hold {service.num_held_bytes} bytes, {num_more} more are "
                    f"too many (server.max_bodies_bytes={config.max_bodies_bytes})",
                    code="bodies_waiting",
                    headers={**retry_after(config.retry_after_s), "connection": "close"},
                )
            service.num_held_bytes += num_more
        self.num_bytes = num_bytes


class Service:
    """The server without its routes."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer | Future[Tokenizer],
        config: ServerConfig,
        *,
        metrics: Metrics,
        journal: Journal,
        slo: SloConfig,
        read_config: Callable[[], ServerConfig] | None = None,
        traces: Traces | None = None,
        renders: TemplateRenders | None = None,
        sampling_defaults: SamplingDefaults = OPENAI_DEFAULTS,
    ) -> None:
        """journal: the one that watches the engine. read_config: reads the configuration again, for reload().

        renders: of another owner, who closes them.
        """
        self.engine = engine
        self.config = config
        self.keys = KeyRing(config)
        self.slo = slo
        self.sampling_defaults = sampling_defaults
        self.metrics = metrics
        self.journal = journal
        self.streams = Streams(engine.now_s)
        self.recent_items = RecentItems()
        self.admission = Admission(engine.now_s, journal.forecast)
        self.num_held_bytes = 0  # of large bodies until they are admitted, and of text that a thread still works on
        self.is_draining = False
        self.end_server: Callable[[], None] = lambda: None  # set by whoever runs the server
        self.traces = traces
        self.grammars = Grammars()
        self._renders = TemplateRenders() if renders is None else renders
        self._owns_renders = renders is None
        self._read_config = read_config
        self._num_active = 0  # HTTP requests that a drain waits for
        self._is_idle: asyncio.Event | None = None
        self.started_unix_s = int(time.time())
        self._tokenizer = tokenizer
        self._text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._long_text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="long-text")
        self._lag_watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and listen to it."""
        loop = asyncio.get_running_loop()
        self.streams.attach(loop)
        self.engine.on_status(lambda: self._post(loop))
        self.engine.start(self.streams.deliver)
        self._lag_watch = asyncio.create_task(watch_lag(self.metrics))

    async def stop(self) -> None:
        """Stop the engine; requests still open end with an error."""
        if self._lag_watch is not None:
            self._lag_watch.cancel()
        await asyncio.to_thread(self.engine.stop, self.config.stop_timeout_s)
        self.streams.end_all(lambda: EngineLost("the server is shutting down"))
        for threads in (self._text_threads, self._long_text_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        await self.grammars.close()
        if self._owns_renders:
            await asyncio.to_thread(self._renders.close)
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    async def drain(self) -> None:
        """Take nothing new; return when what runs is done, or when its time is up and it has been told."""
        if self.is_draining:
            return
        self.is_draining = True
        self._is_idle = asyncio.Event()
        if not self._num_active:
            return
        log.info("drain_began", extra={"fields": {"num_active": self._num_active}})
        for timeout_s, is_told in ((self.config.drain_timeout_s, True), (_TELLING_S, False)):
            try:
                async with asyncio.timeout(timeout_s):
                    await self._is_idle.wait()
                return
            except TimeoutError:
                if is_told:
                    log.warning("drain_timed_out", extra={"fields": {"num_cut_off": self._num_active}})
                    self.streams.end_all(self._stopping)

    def began(self) -> None:
        """An HTTP request that a drain waits for has come in."""
        self._num_active += 1

    def ended(self) -> None:
        """One of those is over."""
        self._num_active -= 1
        if not self._num_active and self._is_idle is not None:
            self._is_idle.set()

    def check_open(self) -> None:
        """ApiError 503 once the server is shutting down."""
        if self.is_draining:
            raise self._stopping()

    def _stopping(self) -> ApiError:
        return ApiError(
            503, "the server is shutting down", code="server_stopping",
            headers={**retry_after(self.config.retry_after_s), "connection": "close"},
        )  # fmt: skip

    async def reload(self) -> list[str]:
        """Read keys and limits again; the names of the settings that changed. ConfigError: nothing has changed."""
        if self._read_config is None:
            raise ConfigError("this server was not started from a configuration that can be read again")
        config = await asyncio.to_thread(self._read_config)
        changed = [
            name for name in ServerConfig.__dataclass_fields__ if getattr(config, name) != getattr(self.config, name)
        ]
        fixed = [name for name in changed if name in FIXED_FIELDS]
        if fixed:
            raise ConfigError(f"server.{fixed[0]} cannot change while the server runs; start it again")
        self.keys, self.config = KeyRing(config), config
        log.info("reloaded", extra={"fields": {"changed": ",".join(changed) or "keys only"}})
        return changed

    async def reload_and_log(self) -> None:
        """As reload(), for a signal, which nobody answers."""
        try:
            await self.reload()
        except ConfigError as error:
            log.error("reload_refused", extra={"fields": {"why": str(error)}})

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

    def on_status(self, on_change: Callable[[], None]) -> None:
        """Have this called after every change of status, on whichever thread makes it; it must return at once."""
        self.engine.on_status(on_change)
        if isinstance(self._tokenizer, Future):
            self._tokenizer.add_done_callback(lambda _: on_change())

    def ready(self) -> Ready:
        """What routes work with; ApiError 503 while loading and once failed."""
        self.check_open()
        status = self.status
        facts = self.engine.facts
        match status.phase:
            case EnginePhase.READY | EnginePhase.RECOVERING if facts is not None:
                tokenizer = self._tokenizer.result() if isinstance(self._tokenizer, Future) else self._tokenizer
                return Ready(facts, tokenizer, self.sampling_defaults)
            case EnginePhase.FAILED:
                raise ApiError(503, f"the engine has failed: {status.detail}", code="engine_failed")
            case EnginePhase.STOPPED:
                raise ApiError(503, "the server is shutting down", code="engine_stopped",
                               headers=retry_after(self.config.retry_after_s))
            case _:
                percent = f"{100 * status.fraction:.0f}%"
                detail = f": {status.detail}" if status.detail else ""
                raise ApiError(
                    503,
                    f"the model is loading, {percent}{detail}",
                    code="model_loading",
                    headers={"retry-after": str(self.config.retry_after_s)},
                )

    def progress_comment(self, spec: GenerationSpec) -> bytes:
        """An SSE comment: how far the first choice's prompt is."""
        return self.journal.progress(spec.request_id(0), self.engine.now_s()).as_comment()

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

    async def work_on_text(self, num_chars: int, work: Callable[[], T]) -> T:
        """Run tokenizer work: here if the text is short, else on a thread, long text on others.

        Work that has not begun when its caller is cancelled never does; what has begun is counted until it is done.
        """
        if num_chars <= MAX_INLINE_CHARS:
            return work()
        threads = self._text_threads if num_chars <= LONG_TEXT_CHARS else self._long_text_threads
        return await self._wait_for(num_chars, lambda: threads.submit(work))

    async def render(
        self, template: ChatTemplate, messages: Iterable[dict[str, Any]], options: dict[str, Any], num_chars: int
    ) -> str:
        """The prompt's text, made in another process: as TemplateRenders.submit. ApiError 503 if there is none."""
        try:
            return await self._wait_for(
                num_chars, lambda: self._renders.submit(template, messages, options, num_chars)
            )
        except NoRenderProcess as error:
            headers = retry_after(self.config.retry_after_s)
            raise ApiError(503, str(error), code="no_render_process", headers=headers) from None

    def prepare(self) -> None:
        """Start what the first chat would otherwise wait for, once the tokenizer is there."""
        if isinstance(self._tokenizer, Tokenizer):
            self._renders.prepare(self._tokenizer.template)
        else:
            self._tokenizer.add_done_callback(self._prepare)

    def _prepare(self, loaded: Future[Tokenizer]) -> None:
        if loaded.exception() is None:
            self._renders.prepare(loaded.result().template)

    async def _wait_for(self, num_chars: int, begin: Callable[[], Future[T]]) -> T:
        working = begin()
        done = asyncio.wrap_future(working)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            # The caller, who held the body's bytes, is gone.
            working.cancel()
            num_left = num_chars if num_chars > SMALL_BODY_BYTES and not done.done() else 0
            self.num_held_bytes += num_left

            def end(_: asyncio.Future[T]) -> None:
                self.num_held_bytes -= num_left
                if not done.cancelled():
                    done.exception()  # nobody else takes it

            done.add_done_callback(end)
            raise

    def hold_body(self) -> HeldBytes:
        """Counts what one request holds in memory until it is admitted; for a with statement."""
        return HeldBytes(self)

    def _post(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended, and every request with it
            loop.call_soon_threadsafe(self._end_streams_of_dead_engine)

    def _end_streams_of_dead_engine(self) -> None:
        # The engine sends each request its end before this. Should it miss one, that request still ends.
        status = self.engine.status
        if status.phase in (EnginePhase.FAILED, EnginePhase.STOPPED):
            detail = status.detail or status.phase.value
            self.streams.end_all(lambda: EngineLost(f"the engine has failed: {detail}"))
