"""Bodies of /v1/messages and the events of its stream, as Anthropic defines them."""

from __future__ import annotations

from typing import Any

from msgspec import Raw, Struct

from megatron_medha.server.bodies.openai_types import ResponseFormat, SharedFields, StopStrings


class BlockSource(Struct, kw_only=True):
    """Where a document's text is."""

    type: str
    data: str | None = None
    content: str | list[InputBlock] | None = None


class InputBlock(Struct, kw_only=True):
    """One block of a message: text, a call, what a call returned, or what is not read here."""

    type: str
    text: str | None = None
    id: str | None = None                                # of a call
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None                       # of what a call returned
    content: Any = None
    is_error: bool | None = None
    title: str | None = None                             # of a document or a search result
    context: str | None = None
    source: BlockSource | str | None = None


class InputMessage(Struct, kw_only=True):
    """One message of the conversation."""

    role: str
    content: str | list[InputBlock]


class MessagesTool(Struct, kw_only=True, omit_defaults=True):
    """A tool that may be called; one with a type of its own and no schema is left out."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessagesToolChoice(Struct, kw_only=True):
    """Whether a tool must be called: auto, any, tool or none."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    """Whether the model reasons first: enabled, adaptive or disabled; for its chat template."""

    type: str


class OutputConfig(Struct, kw_only=True):
    """About a response's text."""

    effort: str | None = None
    format: ResponseFormat | None = None


class MessagesRequest(SharedFields, kw_only=True):
    """Body of POST /v1/messages and of /v1/messages/count_tokens."""

    messages: list[InputMessage]
    system: str | list[InputBlock] | None = None
    stop_sequences: StopStrings | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: ResponseFormat | None = None


class TextBlock(Struct, kw_only=True):
    """Text of a response."""

    type: str = "text"
    text: str = ""


class ToolUseBlock(Struct, kw_only=True):
    """A call in a response."""

    type: str = "tool_use"
    id: str
    name: str
    input: Raw = Raw(b"{}")  # an object


class MessagesUsage(Struct, kw_only=True, frozen=True):
    """What a request cost, in tokens. The prompt has input_tokens and those read from the cache."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class MessagesResponse(Struct, kw_only=True):
    """Response of POST /v1/messages, and part of its stream's first event."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[Any]  # of TextBlock and ToolUseBlock; msgspec's schemas cannot have a union of two objects
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class TokenCount(Struct, kw_only=True):
    """Response of POST /v1/messages/count_tokens."""

    input_tokens: int
