"""What all routes share: the engine, the tokenizer, the limits, and what is known once requests are taken."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.prefix_keys import root_key
from megatron_medha.core.ports import EngineClient, EngineFacts, EnginePhase, EngineStatus
from megatron_medha.server.admission import AdmissionControl
from megatron_medha.server.api_keys import ApiClient, ApiKeys
from megatron_medha.server.http.body_reader import BodyBudget
from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.http.request_body import PromptLimits
from megatron_medha.server.lifecycle import Lifecycle
from megatron_medha.server.observe.live_history import LiveHistory
from megatron_medha.server.observe.loop_lag import measure_loop_lag
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.server.observe.request_log import RequestLog
from megatron_medha.server.observe.tracing import OtelTraces
from megatron_medha.server.output_streams import EngineLost, OutputStreams
from megatron_medha.server.server_config import FIXED_FIELDS, ServerConfig
from megatron_medha.server.session_history import SessionHistory
from megatron_medha.server.slo import SloConfig
from megatron_medha.server.text_workers import RunBlocking, TextWorkers
from megatron_medha.server.tools.structured_output import GrammarCache
from megatron_medha.text.chat.template_renders import TemplateProcessPool
from megatron_medha.text.sampling_defaults import OPENAI_DEFAULTS, SamplingDefaults
from megatron_medha.text.tokenizer import Tokenizer
from megatron_medha.text.turn_encoder import TurnEncoder

log = logging.getLogger(__name__)

# While ranks come up again, requests wait for them: a few seconds later they run, which beats asking again.
_ACCEPTING_PHASES = (EnginePhase.READY, EnginePhase.RECOVERING)
_STOP_TIMEOUT_S = 10.0  # what ranks get to exit before they are killed


@dataclass(frozen=True, slots=True)
class ReadyState:
    """What is known once requests can be taken."""

    facts: EngineFacts
    tokenizer: Tokenizer
    turns: TurnEncoder
    sampling_defaults: SamplingDefaults = OPENAI_DEFAULTS

    @property
    def prompt_limits(self) -> PromptLimits:
        """What no prompt within the model's context exceeds."""
        num_tokens = self.facts.max_request_tokens
        return PromptLimits(num_tokens, self.tokenizer.max_chars(num_tokens))


class Service:
    """The server without its routes."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer | Future[Tokenizer],
        config: ServerConfig,
        *,
        metrics: Metrics | None = None,
        journal: RequestLog | None = None,
        slo: SloConfig | None = None,
        read_config: Callable[[], ServerConfig] | None = None,
        traces: OtelTraces | None = None,
        renders: TemplateProcessPool | None = None,
        sampling_defaults: SamplingDefaults = OPENAI_DEFAULTS,
        isolates_keys: bool = False,
    ) -> None:
        """metrics, journal: those that watch the engine; without them, step metrics and request traces stay empty.

        read_config: reads the configuration again, for reload(). traces: where requests are traced to.
        renders: of another owner, who closes them. sampling_defaults: for what requests leave out.
        isolates_keys: whether requests of different API keys share no cached prefix.
        """
        self.engine = engine
        self.config = config  # replaced whole by a reload
        self.keys = ApiKeys(config)
        self.slo = SloConfig() if slo is None else slo
        self.sampling_defaults = sampling_defaults
        self.metrics = Metrics() if metrics is None else metrics
        self.journal = RequestLog(self.metrics) if journal is None else journal
        self.traces = traces
        self.streams = OutputStreams(engine.now_s)
        self.lifecycle = Lifecycle(self.streams, lambda: self.config)
        self.admission = AdmissionControl(engine.now_s, self.journal.forecast)
        self.bodies = BodyBudget(lambda: self.config)
        self.text = TextWorkers(self.bodies, renders)
        self.grammars = GrammarCache()
        self.sessions = SessionHistory()
        self._turns: TurnEncoder | None = None
        self.started_unix_s = int(time.time())
        self._read_config = read_config
        self._isolates_keys = isolates_keys
        self._prefix_secret = secrets.token_bytes(32)
        self._tokenizer: Future[Tokenizer] = tokenizer if isinstance(tokenizer, Future) else Future()
        if not isinstance(tokenizer, Future):
            self._tokenizer.set_result(tokenizer)
        self.history = LiveHistory(self.metrics)
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the engine and listen to it."""
        loop = asyncio.get_running_loop()
        self.streams.attach(loop)
        self.engine.on_status(lambda: self._post(loop))
        self.engine.start(self.streams.deliver)
        self._watches = [
            asyncio.create_task(measure_loop_lag(self.metrics)), asyncio.create_task(self.history.watch(self.engine))
        ]  # fmt: skip

    async def stop(self, run_blocking: RunBlocking = asyncio.to_thread) -> None:
        """Stop the engine; requests still open end with an error. run_blocking: for what takes seconds."""
        for watch in self._watches:
            watch.cancel()
        await run_blocking(self.engine.stop, _STOP_TIMEOUT_S)
        self.streams.end_all(lambda: EngineLost("the server is shutting down"))
        await self.grammars.close()
        await self.text.close(run_blocking)
        if self.traces is not None:
            await run_blocking(self.traces.close)

    def prepare(self) -> None:
        """Start what the first chat would otherwise wait for, once the tokenizer is there."""
        def begin(loaded: Future[Tokenizer]) -> None:
            if loaded.exception() is None:
                self.text.renders.prepare(loaded.result().template)

        self._tokenizer.add_done_callback(begin)

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
        self.keys, self.config = ApiKeys(config), config
        log.info("reloaded", extra={"fields": {"changed": ",".join(changed) or "keys only"}})
        return changed

    @property
    def status(self) -> EngineStatus:
        """The engine's status, or the tokenizer's where that is what is missing."""
        status = self.engine.status
        if status.phase not in _ACCEPTING_PHASES:
            return status
        if not self._tokenizer.done():
            return EngineStatus(EnginePhase.LOADING, "loading the tokenizer", status.fraction)
        error = self._tokenizer.exception()
        return status if error is None else EngineStatus(EnginePhase.FAILED, f"tokenizer: {error}")

    def on_status(self, on_change: Callable[[], None]) -> None:
        """Have this called after every change of status, on whichever thread makes it; it must return at once."""
        self.engine.on_status(on_change)
        self._tokenizer.add_done_callback(lambda _: on_change())

    @property
    def has_no_template(self) -> bool:
        """Whether chats are written by the plain template; known once the tokenizer is there."""
        return self._tokenizer.done() and self._tokenizer.result().template.is_plain

    def ready(self) -> ReadyState:
        """What routes work with; ApiError 503 while loading and once failed."""
        self.lifecycle.check_open()
        status, facts, wait_s = self.status, self.engine.facts, self.config.retry_after_s
        if status.phase in _ACCEPTING_PHASES and facts is not None:
            tokenizer = self._tokenizer.result()
            self._turns = self._turns or TurnEncoder(tokenizer)
            return ReadyState(facts, tokenizer, self._turns, self.sampling_defaults)
        if status.phase is EnginePhase.FAILED:
            raise ApiError(503, f"the engine has failed: {status.detail}", code="engine_failed")
        if status.phase is EnginePhase.STOPPED:
            raise ApiError(503, "the server is shutting down", code="engine_stopped", retry_after_s=wait_s)
        detail = f": {status.detail}" if status.detail else ""
        message = f"the model is loading, {100 * status.fraction:.0f}%{detail}"
        raise ApiError(503, message, code="model_loading", retry_after_s=wait_s)

    def served_names(self) -> tuple[str, ...]:
        """Names clients may use; empty before the checkpoint's own name is known."""
        if self.config.served_model_names:
            return self.config.served_model_names
        facts = self.engine.facts
        return (facts.shape.name,) if facts is not None else ()

    def model_name(self, asked: str | None) -> str:
        """The name for the response; ApiError 404 for a model that is not served."""
        names = self.served_names()
        if asked is None:
            return names[0] if names else ""
        if asked not in names:
            served = ", ".join(names) or "none yet"
            raise ApiError(
                404, f"the model `{asked}` does not exist; served: {served}", param="model", code="model_not_found"
            )
        return asked

    def prefix_root(self, facts: EngineFacts, address: str, salt: str = "") -> bytes | None:
        """Where the keys of prompts start that may share KV with one another; None without a prefix cache."""
        if facts.granule_tokens is None:
            return None
        return root_key(self._prefix_secret, facts.shape.name, address if self._isolates_keys else "", salt)

    def session_owner(self, client: ApiClient, address: str) -> str:
        """Whose sessions a request may name. It has no blanks."""
        return address if self._isolates_keys else client.name

    def _post(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended, and every request with it
            loop.call_soon_threadsafe(self._end_streams_of_dead_engine)

    def _end_streams_of_dead_engine(self) -> None:
        # The engine sends each request its end before this. Should it miss one, that request still ends.
        status = self.engine.status
        if status.phase in (EnginePhase.FAILED, EnginePhase.STOPPED):
            detail = status.detail or status.phase.value
            self.streams.end_all(lambda: EngineLost(f"the engine has failed: {detail}"))
