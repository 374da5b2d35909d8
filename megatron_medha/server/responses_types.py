"""Bodies of /v1/responses and the events of its stream, as OpenAI defines them."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from megatron_medha.server.openai_types import Count, Probability


class InputPart(Struct, kw_only=True):
    """One part of a message or of a function's output."""

    type: str
    text: str | None = None


class InputItem(Struct, kw_only=True):
    """A message, a call that the model made, or what a call gave."""

    type: str = "message"
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class TextFormat(Struct, kw_only=True, omit_defaults=True):
    """What form an answer takes."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextOptions(Struct, kw_only=True):
    """About an answer's text."""

    format: TextFormat | None = None


class ResponseTool(Struct, kw_only=True, omit_defaults=True):
    """A function that may be called."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Struct, kw_only=True):
    """The function that must be called."""

    type: str
    name: str = ""


class ResponsesRequest(Struct, kw_only=True):
    """Body of POST /v1/responses. Any: refused unless it asks for nothing."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    seed: int | None = None      # ours from here on, as in chats
    priority: int | None = None
    top_k: int | None = None
    min_p: Probability | None = None
    store: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    include: Any = None
    reasoning: Any = None
    truncation: Any = None
    top_logprobs: Any = None
    max_tool_calls: Any = None


class OutputText(Struct, kw_only=True):
    """What a message says."""

    type: str = "output_text"
    text: str = ""
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(Struct, kw_only=True):
    """A message of an answer."""

    type: str = "message"
    id: str
    status: str = "in_progress"
    role: str = "assistant"
    content: list[OutputText]


class OutputCall(Struct, kw_only=True):
    """A call in an answer."""

    type: str = "function_call"
    id: str
    status: str = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = OutputMessage | OutputCall


class CachedTokens(Struct, frozen=True):
    """Where the prompt's KV came from."""

    cached_tokens: int = 0


class ReasoningTokens(Struct, frozen=True):
    """What was thought and not said: never counted apart here."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True):
    """What an answer cost, in tokens."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class IncompleteDetails(Struct, kw_only=True):
    """Why an answer ended before its end."""

    reason: str


class ResponseAnswer(Struct, kw_only=True):
    """Answer of POST /v1/responses, and part of its stream's first and last events."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    output: list[Any]  # of OutputItem; a union of two objects is nothing that msgspec's schemas can say
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str]
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


class ResponseEvent(Struct, kw_only=True):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseAnswer | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: Any | UnsetType = UNSET    # of OutputItem
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[str] | UnsetType = UNSET
    code: str | None | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | None | UnsetType = UNSET
    error: Any | UnsetType = UNSET   # of ErrorBody; by it the openai package tells that a stream has failed
