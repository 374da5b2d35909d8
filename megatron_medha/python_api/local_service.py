"""The server's Service without HTTP, on an event loop and a thread of its own, beside whatever loop the caller has."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from megatron_medha.cli.parts.serve_parts import make_service, public_options
from megatron_medha.cli.parts.tracking import Tracking
from megatron_medha.core.ports import EnginePhase
from megatron_medha.core.request import Rejection
from megatron_medha.options.serve_options import ServeConfig
from megatron_medha.python_api.api_errors import EngineError, python_error, start_error
from megatron_medha.python_api.growing_output import GrowingOutput
from megatron_medha.python_api.prompts_and_chats import RequestSource
from megatron_medha.server.admission import AdmissionTicket
from megatron_medha.server.api_keys import LOCAL_ADMIN
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http.http_errors import ApiError, rejected
from megatron_medha.server.running_generation import RunningGeneration

T = TypeVar("T")

# Requests that wait here until there is a place for them, instead of failing as over HTTP.
_FULL = ("live_requests", "waiting_requests", "waiting_tokens", "live_requests_per_key")
_MAX_LIVE = 1024  # of one call: more would only wait in the scheduler instead of here
_PROGRESS_S = 5.0
_TRACKING_STOP_S = 30.0


class LocalService:
    """Engine and ranks of one LLM, from its constructor until close(); or until the process ends, however it does."""

    def __init__(self, config: ServeConfig) -> None:
        self.service = make_service(config)
        self.ready: Future[None] = Future()
        self._tracking = Tracking(
            config.options.tracking, self.service.engine, self.service.metrics, public_options(config.options)
        )
        self._process_id = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="llm", daemon=True)
        self._ended: asyncio.Event = asyncio.Event()  # set and replaced whenever a request has ended
        self._num_running = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread.start()
        self.submit(self.service.start()).result()
        self.service.prepare()
        self.service.on_status(self._look)
        self._look()
        self._tracking.start()

    def wait_until_ready(self) -> None:
        """Until requests can be taken, with a line on stderr now and then. Raises ConfigError or EngineError."""
        while True:
            try:
                return self.ready.result(_PROGRESS_S)
            except TimeoutError:
                if self.ready.done():  # that was its own
                    raise
            status = self.service.status
            print(f"loading: {status.detail}, {100 * status.fraction:.0f}%", file=sys.stderr, flush=True)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it on the loop; from any other thread. Raises EngineError once closed."""
        if self._is_closed or os.getpid() != self._process_id:
            work.close()
            why = "it is closed" if self._is_closed else "it belongs to the process that this one was forked from"
            raise EngineError(f"the LLM takes no requests: {why}")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; an interrupt meanwhile, such as Ctrl-C, cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @asynccontextmanager
    async def running(self, source: RequestSource) -> AsyncIterator[tuple[RunningGeneration, GrowingOutput]]:
        """One request in the engine, and its output to be; on the loop. It is aborted where the block ends early.

        Raises RequestError or EngineError.
        """
        service = self.service
        try:
            tokenizer = service.ready().tokenizer
            spec, ticket = await self._admitted(source)
        except ApiError as error:
            raise python_error(error) from None
        service.metrics.request_admitted(spec)
        generation = RunningGeneration(spec, service, tokenizer, ticket)
        generation.open()
        self._num_running += 1
        try:
            await generation.submit()
            name = source.name or spec.response_id
            yield generation, GrowingOutput(generation, service, tokenizer, source.params, name)
        except ApiError as error:
            generation.cut_off(error.code or "error", "error", generation.num_open)
            raise python_error(error) from None
        except BaseException:
            generation.cut_off("cancelled", "abort", len(generation.live_ids))
            raise
        finally:
            generation.close()
            self._num_running -= 1
            ended, self._ended = self._ended, asyncio.Event()
            ended.set()

    def num_at_once(self, num_choices: int) -> int:
        """How many requests of so many choices one call has in the engine at a time."""
        config = self.service.config
        most = min(config.max_live_requests, config.max_waiting_requests, _MAX_LIVE * num_choices)
        return max(1, most // num_choices)

    def close(self) -> None:
        """End requests, engine and ranks; a second call does nothing. From any thread but the loop's."""
        with self._lock:
            if self._is_closed or os.getpid() != self._process_id:
                return
            self._is_closed = True
        if threading.current_thread() is self._thread:  # the last reference was dropped there
            threading.Thread(target=self._close, name="llm-close").start()
        else:
            self._close()

    def _close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._tracking.stop(_TRACKING_STOP_S)

    async def _end(self) -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for task in requests:
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        # On this thread: when Python exits, no other can be started.
        await self.service.stop(_here)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _look(self) -> None:
        """Take note of a status; on any thread."""
        status = self.service.status
        with self._lock:
            if self.ready.done():
                return
            if status.phase is EnginePhase.READY:
                self.ready.set_result(None)
            elif status.phase is EnginePhase.FAILED:
                self.ready.set_exception(start_error(status.detail))
            elif status.phase is EnginePhase.STOPPED:
                self.ready.set_exception(EngineError("the LLM was closed"))

    async def _admitted(self, source: RequestSource) -> tuple[GenerationSpec, AdmissionTicket]:
        service = self.service
        while True:
            try:
                spec = await source.spec(service)
                ticket = service.admission.admit(service.config, LOCAL_ADMIN, spec.requests())
                if isinstance(ticket, Rejection):
                    raise rejected(ticket)
                return spec, ticket
            except ApiError as error:
                if error.code not in _FULL or not self._num_running:
                    raise
            await self._ended.wait()


async def _here(work: Any, *arguments: Any) -> Any:
    return work(*arguments)
