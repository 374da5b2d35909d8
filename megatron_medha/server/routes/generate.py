"""One generation over HTTP: hands sub-requests to the engine and sends what comes back, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_medha.server.admission import AdmissionTicket
from megatron_medha.server.bodies.openai_types import PromptTokensDetails, Usage
from megatron_medha.server.generation import Choice, Piece
from megatron_medha.server.http.connection import TRANSPORT
from megatron_medha.server.http.http_errors import ApiError, internal_error
from megatron_medha.server.openai.wire_format import WireFormat
from megatron_medha.server.output_streams import ClientDisconnected, OutputStream
from megatron_medha.server.routes.timeouts import RequestTimeouts, until_gone
from megatron_medha.server.running_generation import RunningGeneration
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
# A response of more positions is rendered off the event loop, which other streams need.
MAX_INLINE_POSITIONS = 2_000

T = TypeVar("T")


class GenerationResponse(Response):
    """An ASGI response that generates while it is sent. However it ends, no sub-request outlives it."""

    def __init__(self, wire: WireFormat, service: Service, tokenizer: Tokenizer, ticket: AdmissionTicket) -> None:
        super().__init__()
        self._spec = wire.spec
        self._wire = wire
        self._service = service
        self._engine = service.engine
        self._config = service.config  # of this moment: a reload is for those that come after it
        self._generation = RunningGeneration(wire.spec, service, tokenizer, ticket)
        self._choices = self._generation.choices
        self._path = ""                   # of the route: errors have its shape
        self._status: int | None = None   # once the response has begun
        self._outcome = "done"
        self._num_parts = 0
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this response."""
        loop = asyncio.get_running_loop()
        generation = self._generation
        self._path = scope["path"]
        stream = generation.open()
        watcher = asyncio.ensure_future(_watch_client(receive, stream))
        transport = scope.get("extensions", {}).get(TRANSPORT, {}).get("transport")
        timeouts = RequestTimeouts(loop, stream, transport, self._unsent_part, self._config)
        timeouts.start(self._engine.now_s() - self._spec.arrival_s)
        try:
            await generation.submit()
            if self._spec.is_stream:
                await self._send_stream(stream, send)
            else:
                await self._send_whole(send)
        except ClientDisconnected:
            self._end_as(timeouts.outcome or "client_gone", "abort", len(generation.live_ids))
        except asyncio.CancelledError:
            self._end_as("cancelled", "abort", len(generation.live_ids))
            raise
        except ApiError as error:
            self._end_as(timeouts.outcome or error.code or "error", "error", generation.num_open)
            await self._send_error(error, send)
        except Exception:
            log.exception("response_failed", extra={"fields": {"response_id": self._spec.response_id}})
            self._end_as("internal_error", "error", generation.num_open)
            await self._send_error(internal_error(), send)
            raise
        finally:
            watcher.cancel()
            timeouts.end()
            generation.close()
            self._log_request(scope.get("state", {}))

    def _end_as(self, outcome: str, reason: str, num_choices: int) -> None:
        self._outcome = outcome
        self._generation.cut_off(outcome, reason, num_choices)

    def _log_request(self, state: Mapping[str, Any]) -> None:
        # The one line about a request, and its trace: what it was and how it went, never what it said.
        spec, now_s, traces = self._spec, self._engine.now_s(), self._service.traces
        first_token_s = self._generation.first_token_s
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
            ttft_s = None if first_token_s is None else round(first_token_s - spec.arrival_s, 6)
            duration_s = round(now_s - spec.arrival_s, 6)
            log.info("request_done", extra={"fields": {**fields, "ttft_s": ttft_s, "duration_s": duration_s}})
        if traces is not None:
            trace = self._service.journal.trace(spec.request_id(0))
            scheduled_s = None if trace is None else trace.first_scheduled_s
            traces.export(
                fields, is_error=self._outcome != "done", traceparent=state.get("traceparent"),
                arrival_s=spec.arrival_s, scheduled_s=scheduled_s, first_token_s=first_token_s, ended_s=now_s,
            )  # fmt: skip

    def _unsent_part(self) -> int | None:
        """The number of the part that waits for its reader; None when none does."""
        return self._num_parts if self._is_sending else None

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

    async def _send_whole(self, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        while self._generation.num_open:
            piece = await self._generation.next_piece()
            pieces[piece.choice_index].append(piece)
        num_positions = sum(map(len, pieces)) + len(pieces) * self._num_prompt_positions
        body = await _rendered(num_positions, lambda: self._wire.whole(pieces, self._usage()))
        await self._start(send, 200, {"content-type": "application/json", "content-length": str(len(body))})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, stream: OutputStream, send: Send) -> None:
        spec, wire = self._spec, self._wire
        # The headers wait a little for the first token, so that a refusal by the engine still has its own status.
        if await stream.wait(self._config.sse_header_wait_s):
            piece = await self._generation.next_piece()
            await self._open_events(send)
        else:
            await self._open_events(send)
            await self._send_comments(stream, send)
            piece = await self._generation.next_piece()
        while True:
            usage = self._usage([self._choices[piece.choice_index]]) if spec.has_continuous_usage else None
            if piece.is_first and self._num_prompt_positions > MAX_INLINE_POSITIONS:
                event = await asyncio.to_thread(wire.event, piece, usage)
            else:
                event = wire.event(piece, usage)
            if event:
                await self._send_part(send, event)
            if not self._generation.num_open:
                break
            piece = await self._generation.next_piece()
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
