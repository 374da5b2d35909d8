"""One generation over HTTP: hands sub-requests to the engine and sends what comes back, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_medha.core.ports import ErrorDelivery
from megatron_medha.core.request import Rejection
from megatron_medha.server.admission import AdmissionTicket
from megatron_medha.server.bodies.openai_types import PromptTokensDetails, Usage
from megatron_medha.server.generation import Choice, Piece
from megatron_medha.server.http.connection import TRANSPORT
from megatron_medha.server.http.http_errors import ApiError, internal_error, rejected
from megatron_medha.server.openai.wire_format import WireFormat
from megatron_medha.server.output_streams import ClientDisconnected, EngineLost, OutputStream
from megatron_medha.server.routes.timeouts import RequestTimeouts, until_gone
from megatron_medha.server.service import Service
from megatron_medha.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would bundle events, and with them the times clients measure
}
# Names the fields of a request that were left out; they are paths, never text of the client's.
IGNORED_HEADER = "x-medha-ignored"
MAX_IGNORED = 20  # named there, of a request that may have thousands
KEEPALIVE_COMMENT = b": waiting for the first token\n\n"
PROGRESS_S = 1.0  # between progress comments for clients that ask, where the configuration says nothing
# Steps whose tokens one request may have unread, however small server.max_buffered_tokens is: a step brings a token of
# every choice at once.
UNREAD_STEPS = 16
# A response of more positions is rendered off the event loop, which other streams need.
MAX_INLINE_POSITIONS = 2_000
_SUBMITTED_IDS = 100_000  # that choices get copies of before others run: 0.1 ms
_SUBMITTED = 64           # choices before that: some 3 ms

T = TypeVar("T")


class GenerationResponse(Response):
    """An ASGI response that generates while it is sent. However it ends, no sub-request outlives it."""

    def __init__(self, wire: WireFormat, service: Service, tokenizer: Tokenizer, ticket: AdmissionTicket) -> None:
        super().__init__()
        self._spec = spec = wire.spec
        self._wire = wire
        self._service = service
        self._engine = service.engine
        self._streams = service.streams
        self._metrics = service.metrics
        self._config = service.config  # of this moment: a reload is for those that come after it
        self._ticket = ticket
        self._choices = [Choice(spec, index, tokenizer) for index in range(spec.num_choices)]
        self._choice_by_id = {spec.request_id(choice.index): choice for choice in self._choices}
        self._live_ids: set[str] = set()  # in the engine
        self._num_open = spec.num_choices
        self._path = ""                   # of the route: errors have its shape
        self._status: int | None = None   # once the response has begun
        self._outcome = "done"
        self._num_parts = 0
        self._is_sending = False
        self._first_token_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this response."""
        loop = asyncio.get_running_loop()
        config = self._config
        self._path = scope["path"]
        max_unread = max(config.max_buffered_tokens, UNREAD_STEPS * self._spec.num_choices)
        stream = self._streams.open(tuple(self._choice_by_id), max_unread, self._abort_live)
        watcher = asyncio.ensure_future(_watch_client(receive, stream))
        transport = scope.get("extensions", {}).get(TRANSPORT, {}).get("transport")
        timeouts = RequestTimeouts(loop, stream, transport, self._unsent_part, config)
        timeouts.start(self._engine.now_s() - self._spec.arrival_s)
        try:
            await self._submit()
            if self._spec.is_stream:
                await self._send_stream(stream, send)
            else:
                await self._send_whole(stream, send)
        except ClientDisconnected:
            self._end_as(timeouts.outcome or "client_gone", "abort", len(self._live_ids))
        except asyncio.CancelledError:
            self._end_as("cancelled", "abort", len(self._live_ids))
            raise
        except ApiError as error:
            self._end_as(timeouts.outcome or error.code or "error", "error", self._num_open)
            await self._send_error(error, send)
        except Exception:
            log.exception("response_failed", extra={"fields": {"response_id": self._spec.response_id}})
            self._end_as("internal_error", "error", self._num_open)
            await self._send_error(internal_error(), send)
            raise
        finally:
            watcher.cancel()
            timeouts.end()
            self._streams.close(stream)
            self._abort_live()
            self._ticket.close(sum(choice.num_tokens for choice in self._choices))
            self._log_request(scope.get("state", {}))

    def _abort_live(self) -> None:
        for request_id in self._live_ids:
            self._engine.abort(request_id)
        self._live_ids.clear()

    def _end_as(self, outcome: str, reason: str, num_choices: int) -> None:
        self._outcome = outcome
        for request_id, choice in self._choice_by_id.items():
            if choice.first_token_s is None:
                self._metrics.num_prompt_tokens += self._service.journal.num_computed_prompt_tokens(request_id)
        self._metrics.num_ended[reason] += num_choices
        self._metrics.num_cut_off[outcome] += 1

    def _log_request(self, state: Mapping[str, Any]) -> None:
        # The one line about a request, and its trace: what it was and how it went, never what it said.
        spec, now_s, traces = self._spec, self._engine.now_s(), self._service.traces
        if not self._config.log_requests and traces is None:
            return
        fields = {
            "request_id": state.get("request_id"), "response_id": spec.response_id, "client": state.get("client"),
            "outcome": self._outcome, "status": self._status, "slo_class": spec.slo_class,
            "num_choices": spec.num_choices, "num_prompt_tokens": spec.num_prompt_tokens,
            "num_cached_tokens": self._usage().prompt_tokens_details.cached_tokens,
            "num_output_tokens": sum(choice.num_tokens for choice in self._choices),
        }  # fmt: skip
        if self._config.log_requests:
            ttft_s = None if self._first_token_s is None else round(self._first_token_s - spec.arrival_s, 6)
            duration_s = round(now_s - spec.arrival_s, 6)
            log.info("request_done", extra={"fields": {**fields, "ttft_s": ttft_s, "duration_s": duration_s}})
        if traces is not None:
            trace = self._service.journal.trace(spec.request_id(0))
            scheduled_s = None if trace is None else trace.first_scheduled_s
            traces.export(
                fields, is_error=self._outcome != "done", traceparent=state.get("traceparent"),
                arrival_s=spec.arrival_s, scheduled_s=scheduled_s, first_token_s=self._first_token_s, ended_s=now_s,
            )  # fmt: skip

    def _unsent_part(self) -> int | None:
        """The number of the part that waits for its reader; None when none does."""
        return self._num_parts if self._is_sending else None

    async def _submit(self) -> None:
        for number, choice in enumerate(self._choices, start=1):
            request, token_ids = self._ticket.requests[choice.index], choice.prompt.token_ids
            keys = None if choice.prompt.keys is None else choice.prompt.keys.copy()
            self._live_ids.add(request.request_id)
            self._engine.submit(request, token_ids, self._spec.sampling_of(choice.index), keys)
            if len(token_ids) > _SUBMITTED_IDS or number % _SUBMITTED == 0:
                await asyncio.sleep(0)

    async def _next_piece(self, stream: OutputStream) -> Piece:
        # The next token of any choice; ApiError where a sub-request, and so the whole response, fails.
        try:
            delivery, at_s = await stream.next()
        except EngineLost as error:
            raise ApiError(500, str(error), code="engine_failed") from error
        request_id = delivery.request_id
        if isinstance(delivery, ErrorDelivery):
            self._live_ids.discard(request_id)
            if delivery.is_client_fault:
                raise rejected(Rejection(reason="request_rejected", message=delivery.message))
            raise ApiError(500, delivery.message, code="engine_failed")
        choice = self._choice_by_id[request_id]
        piece = choice.take(delivery)
        if choice.last_token_s is None:
            choice.first_token_s = at_s
            if self._first_token_s is None:
                self._first_token_s = at_s
            self._ticket.first_token(choice.index)
            self._metrics.first_token(self._spec, at_s)
            self._metrics.num_prompt_tokens += len(choice.prompt.token_ids)
        else:
            self._metrics.next_token(at_s - choice.last_token_s)
        choice.last_token_s = at_s
        if piece.finish_reason is not None:
            self._finish(choice, request_id, is_engine_done=delivery.finish_reason is not None)
        return piece

    def _finish(self, choice: Choice, request_id: str, *, is_engine_done: bool) -> None:
        self._num_open -= 1
        self._live_ids.discard(request_id)
        self._streams.forget(request_id)
        if not is_engine_done:
            self._engine.abort(request_id)
        self._metrics.choice_finished(self._spec, choice)

    def _usage(self, choices: list[Choice] | None = None) -> Usage:
        choices = self._choices if choices is None else choices
        num_output = sum(choice.num_tokens for choice in choices)
        num_prompt = self._spec.num_prompt_tokens
        # A prompt counts once: what was cached when the call came, not what its other choices then found.
        num_cached: dict[int, int] = {}
        for choice in choices:
            if choice.last_token_s is not None:
                place = choice.index // self._spec.n
                num_cached[place] = min(num_cached.get(place, choice.num_cached_tokens), choice.num_cached_tokens)
        details = PromptTokensDetails(sum(num_cached.values()))
        return Usage(num_prompt, num_output, num_prompt + num_output, details)

    async def _send_whole(self, stream: OutputStream, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        while self._num_open:
            piece = await self._next_piece(stream)
            pieces[piece.choice_index].append(piece)
        num_positions = sum(map(len, pieces)) + len(pieces) * self._num_prompt_positions
        body = await _rendered(num_positions, lambda: self._wire.whole(pieces, self._usage()))
        await self._start(send, 200, {"content-type": "application/json", "content-length": str(len(body))})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, stream: OutputStream, send: Send) -> None:
        spec, wire = self._spec, self._wire
        # The headers wait a little for the first token, so that a refusal by the engine still has its own status.
        if await stream.wait(self._config.sse_header_wait_s):
            piece = await self._next_piece(stream)
            await self._open_events(send)
        else:
            await self._open_events(send)
            await self._send_comments(stream, send)
            piece = await self._next_piece(stream)
        while True:
            usage = self._usage([self._choices[piece.choice_index]]) if spec.has_continuous_usage else None
            if piece.is_first and self._num_prompt_positions > MAX_INLINE_POSITIONS:
                event = await asyncio.to_thread(wire.event, piece, usage)
            else:
                event = wire.event(piece, usage)
            if event:
                await self._send_part(send, event)
            if not self._num_open:
                break
            piece = await self._next_piece(stream)
        for event in wire.closing_events(self._usage()):
            await self._send_part(send, event)
        await send({"type": "http.response.body", "body": b""})

    @property
    def _num_prompt_positions(self) -> int:
        """Tokens of a prompt that its response includes."""
        spec = self._spec
        is_shown = spec.is_echo or spec.returns_token_ids
        return max(len(prompt.token_ids) for prompt in spec.prompts) if is_shown else 0

    async def _send_comments(self, stream: OutputStream, send: Send) -> None:
        """Comments until the first token: a keepalive, or progress where the client asked for it."""
        if not self._spec.has_progress:
            while not await stream.wait(self._config.sse_keepalive_s):
                await self._send_part(send, KEEPALIVE_COMMENT)
            return
        first_id, journal = self._spec.request_id(0), self._service.journal
        is_computed = False
        while not is_computed:
            await self._send_part(send, journal.progress(first_id, self._engine.now_s()).as_comment())
            is_computed = await stream.wait(self._config.sse_progress_s or PROGRESS_S)

    async def _open_events(self, send: Send) -> None:
        await self._start(send, 200, SSE_HEADERS)
        for event in await _rendered(self._num_prompt_positions, self._wire.opening_events):
            await self._send_part(send, event)

    async def _send_error(self, error: ApiError, send: Send) -> None:
        body = error.as_json(self._path)
        if self._status is None:
            headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
            await self._start(send, error.status, headers)
            await send({"type": "http.response.body", "body": body})
        elif self._spec.is_stream:
            for event in self._wire.error_events(error):
                await self._send_part(send, event)
            await send({"type": "http.response.body", "body": b""})

    async def _start(self, send: Send, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        if ignored := self._spec.ignored:
            more = f" and {len(ignored) - MAX_IGNORED} more" if len(ignored) > MAX_IGNORED else ""
            headers = {**headers, IGNORED_HEADER: ", ".join(ignored[:MAX_IGNORED]) + more}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def _send_part(self, send: Send, body: bytes) -> None:
        # Waits while the client has too much unread; RequestTimeouts checks for how long. No clock: once per token.
        self._num_parts += 1
        self._is_sending = True
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._is_sending = False


async def _rendered(num_positions: int, render: Callable[[], T]) -> T:
    """What `render` makes of so many tokens: here, or on a thread if they are many."""
    return render() if num_positions <= MAX_INLINE_POSITIONS else await asyncio.to_thread(render)


async def _watch_client(receive: Receive, stream: OutputStream) -> None:
    await until_gone(receive)
    stream.end(ClientDisconnected())
