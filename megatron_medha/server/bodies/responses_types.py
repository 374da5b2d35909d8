"""Bodies of /v1/responses and the events of its stream, as OpenAI defines them."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from megatron_medha.server.bodies.openai_types import (
    ContentPart,
    Count,
    JsonSchemaFormat,
    PromptTokensDetails,
    SharedFields,
    TokenLogprob,
)


class InputPart(ContentPart, kw_only=True):
    """One part of a message, or of what a tool returned, which may lack a type."""

    type: str = ""


class InputItem(Struct, kw_only=True):
    """A message, a call that the model made, what a call returned, or another item of an earlier response."""

    type: str = "message"
    id: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Any = None
    input: Any = None      # of a custom tool's call
    action: Any = None     # of a call of a tool that OpenAI defines: of a shell, of a patch
    operation: Any = None
    output: Any = None


class TextFormat(JsonSchemaFormat, kw_only=True, omit_defaults=True):
    """The form of a response's text: text, json_object, or json_schema with its fields."""

    type: str


class TextOptions(Struct, kw_only=True):
    """About a response's text."""

    format: TextFormat | None = None


class ResponseTool(Struct, kw_only=True, omit_defaults=True):
    """A function, a tool that takes free text, a namespace of such, or a tool that is left out."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: Any = None                        # of a custom tool's text
    tools: list[ResponseTool] | None = None   # of a namespace


class ResponseToolChoice(Struct, kw_only=True, omit_defaults=True):
    """The tool that must be called, or the tools that may be."""

    type: str
    name: str = ""
    namespace: str | None = None
    mode: str | None = None
    tools: list[ResponseTool] | None = None


class Reasoning(Struct, kw_only=True):
    """How long a model reasons; what of it is shown is left to the model."""

    effort: str | None = None


class ResponsesRequest(SharedFields, kw_only=True):
    """Body of POST /v1/responses. Any: refused unless it asks for nothing."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Count | None = None
    store: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None


class OutputText(Struct, kw_only=True):
    """What a message says."""

    type: str = "output_text"
    text: str = ""
    annotations: list[str] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Struct, kw_only=True):
    """A message of a response."""

    type: str = "message"
    id: str
    status: str = "in_progress"
    role: str = "assistant"
    content: list[OutputText]


class OutputCall(Struct, kw_only=True):
    """A call of a function (function_call), or of a tool that takes free text (custom_tool_call)."""

    type: str
    id: str
    status: str = "in_progress"
    call_id: str
    name: str
    arguments: str | UnsetType = UNSET  # of a function
    input: str | UnsetType = UNSET      # of a custom tool
    namespace: str | UnsetType = UNSET


class ReasoningTokens(Struct, frozen=True):
    """What was thought and not said: never counted apart here."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True):
    """What a response cost, in tokens."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails = PromptTokensDetails()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class IncompleteDetails(Struct, kw_only=True):
    """Why a response ended before its end."""

    reason: str


class ResponsesResponse(Struct, kw_only=True):
    """Response of POST /v1/responses, and part of its stream's first and last events."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    output: list[Any]  # of OutputMessage and OutputCall; msgspec's schemas cannot have a union of two objects
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: TextOptions
    tool_choice: str | ResponseToolChoice
    tools: list[ResponseTool]
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
