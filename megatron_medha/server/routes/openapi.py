"""The schema at /openapi.json: routing.py lists the routes, msgspec describes their bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from megatron_medha.server.bodies import openai_types as types
from megatron_medha.server.bodies.anthropic_types import MessagesRequest, MessagesResponse, TokenCount
from megatron_medha.server.bodies.responses_types import ResponsesRequest, ResponsesResponse
from megatron_medha.server.http.http_errors import AnthropicError, ErrorResponse

BODIES = (
    types.CompletionRequest,
    types.CompletionResponse,
    types.ChatRequest,
    types.ChatCompletionResponse,
    types.TokenizeRequest,
    types.TokenizeResponse,
    types.DetokenizeRequest,
    types.DetokenizeResponse,
    types.Model,
    types.ModelList,
    types.Readiness,
    types.Reloaded,
    types.Version,
    ResponsesRequest,
    ResponsesResponse,
    MessagesRequest,
    MessagesResponse,
    TokenCount,
    ErrorResponse,
    AnthropicError,
)
REF_TEMPLATE = "#/components/schemas/{name}"


def components() -> dict[str, Any]:
    """JSON schemas of all bodies, by name."""
    _, by_name = msgspec.json.schema_components(BODIES, ref_template=REF_TEMPLATE)
    return dict(by_name)


def operation(
    answer: type | None,
    *,
    body: type | None = None,
    errors: tuple[int, ...] = (),
    error: type = ErrorResponse,
    has_events: bool = False,
) -> dict[str, Any]:
    """What a route takes and gives, for its openapi_extra."""
    ok: dict[str, Any] = {"application/json": {"schema": _ref(answer)}} if answer is not None else {"text/plain": {}}
    if has_events:
        ok["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "OK", "content": ok}}
    for status in errors:
        responses[str(status)] = {
            "description": "Error", "content": {"application/json": {"schema": _ref(error)}},
        }
    extra: dict[str, Any] = {"responses": responses}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return extra


def _ref(body: type) -> dict[str, str]:
    return {"$ref": REF_TEMPLATE.format(name=body.__name__)}
