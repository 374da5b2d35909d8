"""One generation over HTTP: hands sub-requests to the engine and sends what comes back, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_medha.engine.ports import EngineClient, ErrorDelivery
from megatron_medha.server.config import ServerConfig
from megatron_medha.server.errors import ApiError, our_bug
from megatron_medha.server.generation import Choice, GenerationSpec, Piece
from megatron_medha.server.metrics import Metrics
from megatron_medha.server.openai_types import Usage
from megatron_medha.server.streams import EngineLost, Gone, Stream, Streams
from megatron_medha.server.tokens import Tokenizer
from megatron_medha.server.wire_format import DONE_EVENT, WireFormat

log = logging.getLogger(__name__)

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would bundle events, and with them the times clients measure
}
KEEPALIVE_COMMENT = b": waiting for the first token\n\n"
# Above this many positions an answer is rendered off the event loop, which other streams need.
MAX_INLINE_POSITIONS = 2_000


class Answer(Response):
    """An ASGI response that generates while it is sent. However it ends, no sub-request outlives it."""

    def __init__(
        self,
        spec: GenerationSpec,
        wire: WireFormat,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        streams: Streams,
        metrics: Metrics,
        config: ServerConfig,
    ) -> None:
        super().__init__()
        self._spec = spec
        self._wire = wire
        self._engine = engine
        self._streams = streams
        self._metrics = metrics
        self._config = config
        self._choices = [Choice(spec, index, tokenizer) for index in range(spec.num_choices)]
        self._choice_by_id = {spec.request_id(choice.index): choice for choice in self._choices}
        self._live_ids: set[str] = set()  # in the engine
        self._num_open = spec.num_choices
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this one answer."""
        stream = self._streams.open(tuple(self._choice_by_id))
        watcher = asyncio.ensure_future(_watch_client(receive, stream))
        try:
            self._submit()
            if self._spec.is_stream:
                await self._send_stream(stream, send)
            else:
                await self._send_whole(stream, send)
        except Gone:
            self._metrics.choices_ended("abort", len(self._live_ids))
        except asyncio.CancelledError:
            self._metrics.choices_ended("abort", len(self._live_ids))
            raise
        except ApiError as error:
            self._metrics.choices_ended("error", self._num_open)
            await self._send_error(error, send)
        except Exception:
            log.exception("answer failed", extra={"answer_id": self._spec.answer_id})
            self._metrics.choices_ended("error", self._num_open)
            await self._send_error(our_bug(), send)
            raise
        finally:
            watcher.cancel()
            self._streams.close(stream)
            for request_id in self._live_ids:
                self._engine.abort(request_id)
            self._live_ids.clear()

    def _submit(self) -> None:
        for choice in self._choices:
            request, token_ids, sampling = self._spec.engine_request(choice.index)
            self._live_ids.add(request.request_id)
            self._engine.submit(request, token_ids, sampling)

    async def _next_piece(self, stream: Stream) -> Piece:
        # The next token of any choice; ApiError where a sub-request, and so the whole answer, fails.
        try:
            delivery, at_s = await stream.next()
        except EngineLost as error:
            raise ApiError(500, str(error), code="engine_failed") from error
        request_id = delivery.request_id
        if isinstance(delivery, ErrorDelivery):
            self._live_ids.discard(request_id)
            if delivery.is_client_fault:
                raise ApiError(400, delivery.message, code="request_rejected")
            raise ApiError(500, delivery.message, code="engine_failed")
        choice = self._choice_by_id[request_id]
        piece = choice.take(delivery)
        if choice.last_token_s is None:
            choice.first_token_s = at_s
            self._metrics.first_token(self._spec, at_s)
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
        num_output = sum(choice.num_tokens for choice in (self._choices if choices is None else choices))
        num_prompt = self._spec.num_prompt_tokens
        return Usage(num_prompt, num_output, num_prompt + num_output)

    async def _send_whole(self, stream: Stream, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        while self._num_open:
            piece = await self._next_piece(stream)
            pieces[piece.choice_index].append(piece)
        num_positions = sum(len(of_choice[0].prompt_logprobs or ()) + len(of_choice) for of_choice in pieces)
        if num_positions > MAX_INLINE_POSITIONS:
            body = await asyncio.to_thread(self._wire.whole, pieces, self._usage())
        else:
            body = self._wire.whole(pieces, self._usage())
        await self._start(send, 200, {"content-type": "application/json", "content-length": str(len(body))})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, stream: Stream, send: Send) -> None:
        spec, wire = self._spec, self._wire
        # The headers wait a little for the first token, so that a refusal by the engine still has its own status.
        if await stream.wait(self._config.sse_header_wait_s):
            piece = await self._next_piece(stream)
            await self._open_events(send)
        else:
            await self._open_events(send)
            while not await stream.wait(self._config.sse_keepalive_s):
                await _send_part(send, KEEPALIVE_COMMENT)
            piece = await self._next_piece(stream)
        while True:
            usage = self._usage([self._choices[piece.choice_index]]) if spec.has_continuous_usage else None
            await _send_part(send, wire.event(piece, usage))
            if not self._num_open:
                break
            piece = await self._next_piece(stream)
        if spec.includes_usage:
            await _send_part(send, wire.usage_event(self._usage()))
        await _send_part(send, DONE_EVENT)
        await send({"type": "http.response.body", "body": b""})

    async def _open_events(self, send: Send) -> None:
        await self._start(send, 200, SSE_HEADERS)
        for event in self._wire.opening_events():
            await _send_part(send, event)

    async def _send_error(self, error: ApiError, send: Send) -> None:
        body = error.as_json()
        if not self._has_started:
            headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
            await self._start(send, error.status, headers)
            await send({"type": "http.response.body", "body": body})
        elif self._spec.is_stream:
            await _send_part(send, b"data: " + body + b"\n\n")
            await _send_part(send, DONE_EVENT)
            await send({"type": "http.response.body", "body": b""})

    async def _start(self, send: Send, status: int, headers: Mapping[str, str]) -> None:
        self._has_started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_part(send: Send, body: bytes) -> None:
    message: dict[str, Any] = {"type": "http.response.body", "body": body, "more_body": True}
    await send(message)


async def _watch_client(receive: Receive, stream: Stream) -> None:
    # The body has been read, so what comes next can only be the end of the connection.
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.end(Gone())
