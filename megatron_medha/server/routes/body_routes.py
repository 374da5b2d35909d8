"""Routes that take a prompt: those that generate, and those that count or name its tokens."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from megatron_medha.core.request import Rejection
from megatron_medha.server.anthropic import anthropic_messages
from megatron_medha.server.bodies import openai_types as types
from megatron_medha.server.bodies.anthropic_types import MessagesRequest, MessagesResponse, TokenCount
from megatron_medha.server.bodies.responses_types import ResponsesRequest, ResponsesResponse
from megatron_medha.server.http.body_reader import BodyMemory, read_body
from megatron_medha.server.http.http_errors import AnthropicError, rejected
from megatron_medha.server.http.request_body import BodyType, decode_request
from megatron_medha.server.http.routing import Api, Shape
from megatron_medha.server.openai import chat_completions, completions, responses, tokenize
from megatron_medha.server.openai.recent_items import RecentItems
from megatron_medha.server.openai.request_fields import RequestContext, read_context
from megatron_medha.server.openai.wire_format import WireFormat
from megatron_medha.server.routes.generate import GenerationResponse
from megatron_medha.server.routes.timeouts import cancel_on_disconnect
from megatron_medha.server.service import ReadyState, Service

T = TypeVar("T")

_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503)
_ANTHROPIC: dict[str, Any] = {"errors": _ERRORS, "error": AnthropicError}


def add_generating_routes(app: Api, service: Service) -> None:
    """The four that generate."""

    def add(
        path: str,
        name: str,
        what: str,
        body_type: BodyType[T],
        prepare: Callable[[Service, RequestContext, T], Coroutine[Any, Any, WireFormat]],
        shape: Shape,
    ) -> None:
        async def route(request: Request) -> Response:
            with BodyMemory(service.bodies) as memory:
                raw = await read_body(request, service.config, memory)
                context = read_context(request, service)
                body = await decode_request(raw, body_type, context.ready.prompt_limits)
                wire = await cancel_on_disconnect(request.receive, memory.num_bytes, prepare(service, context, body))
            # No await from here to the start of the response, so that the ticket cannot be lost.
            service.lifecycle.check_open()
            ticket = service.admission.admit(service.config, context.key, wire.spec.requests())
            if isinstance(ticket, Rejection):
                raise rejected(ticket)
            service.metrics.request_admitted(wire.spec)
            return GenerationResponse(wire, service, context.ready.tokenizer, ticket)

        route.__doc__ = what
        app.add_api_route(path, "POST", shape, route, name)

    add("/v1/completions", "completions", "Continue one or more prompts.",
        completions.BODY, completions.prepare_completion,
        Shape(answer=types.CompletionResponse, body=types.CompletionRequest, errors=_ERRORS, has_events=True))
    add("/v1/chat/completions", "chat_completions", "Answer a chat.",
        chat_completions.BODY, chat_completions.prepare_chat_completion,
        Shape(answer=types.ChatCompletionResponse, body=types.ChatRequest, errors=_ERRORS, has_events=True))
    add("/v1/responses", "create_response",
        "Answer a chat, as OpenAI's newer clients send it. Answers are not stored.",
        responses.BODY, partial(responses.prepare_response, recent=RecentItems()),
        Shape(answer=ResponsesResponse, body=ResponsesRequest, errors=_ERRORS, has_events=True))
    add("/v1/messages", "create_message", "Answer a chat, as Anthropic's clients send it.",
        anthropic_messages.BODY, anthropic_messages.prepare_message,
        Shape(answer=MessagesResponse, body=MessagesRequest, has_events=True, **_ANTHROPIC))


def add_token_routes(app: Api, service: Service) -> None:
    """Routes that read a prompt and generate nothing."""

    def add(
        path: str,
        name: str,
        what: str,
        body_type: BodyType[T],
        answer: Callable[[Service, ReadyState, T], Coroutine[Any, Any, Response]],
        shape: Shape,
    ) -> None:
        async def route(request: Request) -> Response:
            with BodyMemory(service.bodies) as memory:
                raw = await read_body(request, service.config, memory)
                ready = service.ready()
                body = await decode_request(raw, body_type, ready.prompt_limits)
                return await cancel_on_disconnect(request.receive, memory.num_bytes, answer(service, ready, body))

        route.__doc__ = what
        app.add_api_route(path, "POST", shape, route, name)

    add("/v1/messages/count_tokens", "count_message_tokens", "How many tokens the prompt of a chat has.",
        anthropic_messages.BODY, anthropic_messages.count_tokens,
        Shape(answer=TokenCount, body=MessagesRequest, **_ANTHROPIC))
    add("/tokenize", "tokenize_text", "Token ids of a prompt or of messages.",
        tokenize.TOKENIZE_BODY, tokenize.tokenize,
        Shape(answer=types.TokenizeResponse, body=types.TokenizeRequest, errors=_ERRORS))
    add("/detokenize", "detokenize_ids", "Text of token ids.",
        tokenize.DETOKENIZE_BODY, tokenize.detokenize,
        Shape(answer=types.DetokenizeResponse, body=types.DetokenizeRequest, errors=_ERRORS))
