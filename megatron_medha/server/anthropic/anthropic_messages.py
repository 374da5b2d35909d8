"""/v1/messages: a chat in Anthropic's words."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.responses import Response

from megatron_medha.server.anthropic.anthropic_blocks import chat_choice, read_conversation
from megatron_medha.server.bodies.anthropic_types import (
    MessagesRequest,
    MessagesResponse,
    MessagesUsage,
    TextBlock,
    TokenCount,
    ToolUseBlock,
)
from megatron_medha.server.bodies.openai_types import ChatRequest, Usage
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.http.http_errors import ANTHROPIC_PREFIX, ApiError
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.http.routing import json_response
from megatron_medha.server.openai.block_format import BlockFormat
from megatron_medha.server.openai.chat_completions import chat_spec
from megatron_medha.server.openai.chat_prompt import CHARS_PER_MESSAGE, ConversationHistory
from megatron_medha.server.openai.request_fields import RequestContext, refuse_all
from megatron_medha.server.openai.tokenize import chat_token_ids
from megatron_medha.server.service import ReadyState, Service
from megatron_medha.server.tools.call_readers import TextDelta, ToolArgumentsDelta, ToolCallStart, ToolParserEvent
from megatron_medha.server.tools.json_text import dump, read_cut_object

BODY = BodyType(msgspec.json.Decoder(MessagesRequest), texts=frozenset({"messages", "system"}))

_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("n", (None, 1), "one answer at a time; /v1/chat/completions gives several"),
)
_PATHS = {"stop": "stop_sequences", "response_format.json_schema.schema": "output_config.format.schema"}


async def prepare_message(service: Service, context: RequestContext, body: MessagesRequest) -> MessagesFormat:
    """As chat_spec, of the chat that this is; ApiError 4xx says what is wrong."""
    refuse_all(body, _REFUSED)
    conversation = await _read(service, body)
    chat = _as_chat(body, conversation)
    with conversation.renamed_errors(_PATHS):
        spec = await chat_spec(service, context, chat, id_prefix="msg", ignored=conversation.ignored)
    return MessagesFormat(spec)


async def count_tokens(service: Service, ready: ReadyState, body: MessagesRequest) -> Response:
    """How long the prompt of this request is."""
    conversation = await _read(service, body)
    chat = _as_chat(body, conversation)
    if chat.tool_choice == "none":
        chat.tools = None
    with conversation.renamed_errors({}):
        return json_response(TokenCount(input_tokens=len(await chat_token_ids(service, ready, chat))))


async def _read(service: Service, body: MessagesRequest) -> ConversationHistory:
    num_blocks = sum(1 if isinstance(one.content, str) else 1 + len(one.content) for one in body.messages)
    return await service.text.run(CHARS_PER_MESSAGE * num_blocks, lambda: read_conversation(body))


def _as_chat(body: MessagesRequest, conversation: ConversationHistory) -> ChatRequest:
    choice, output = body.tool_choice, body.output_config
    chat = conversation.request(
        body,
        tool_choice=chat_choice(choice) if conversation.tools or (choice and choice.type in ("any", "tool")) else None,
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        reasoning_effort=output.effort if output else None,
    )
    if body.stop_sequences:
        chat.stop = body.stop_sequences
    if (wanted := body.output_format or (output.format if output else None)) is not None:
        chat.response_format = wanted
    if body.thinking is not None:
        # The names that templates read, Qwen's and DeepSeek's; others pass over them.
        chat.chat_template_kwargs = dict.fromkeys(("enable_thinking", "thinking"), body.thinking.type != "disabled")
    last = conversation.messages[-1] if conversation.messages else None
    if last is not None and last.role == "assistant" and not last.tool_calls:  # the client has begun the response
        chat.continue_final_message, chat.add_generation_prompt = True, False
    return chat


class MessagesFormat(BlockFormat):
    """JSON of /v1/messages: blocks of content, each with its events."""

    def __init__(self, spec: GenerationSpec) -> None:
        super().__init__(spec)
        self._stop_reason = "end_turn"
        self._stop_sequence: str | None = None

    def opening_events(self) -> Sequence[bytes]:
        """The message without its content, and a ping."""
        self._emit("message_start", message=self._response(None))
        self._emit("ping")
        return self._take_events()

    def closing_events(self, usage: Usage) -> Sequence[bytes]:
        """Why the message ended, what it cost, and its end."""
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        self._emit("message_delta", delta=delta, usage=self._usage(usage))
        self._emit("message_stop")
        return self._take_events()

    def error_events(self, error: ApiError) -> Sequence[bytes]:
        """The error in place of what would have followed."""
        return (b"event: error\ndata: " + error.as_json(ANTHROPIC_PREFIX) + b"\n\n",)

    def _finish(self, piece: Piece) -> None:
        if isinstance(piece.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", piece.stop_reason
        elif piece.finish_reason == "length":
            self._stop_reason = "max_tokens"
        elif self._finder is not None and self._finder.has_calls:
            self._stop_reason = "tool_use"

    def _add(self, found: ToolParserEvent) -> None:
        match found:
            case TextDelta(text=""):
                pass
            case TextDelta():
                if not (self._is_open and isinstance(self._blocks[-1], TextBlock)):
                    self._begin(TextBlock())
                self._blocks[-1].text += found.text
                self._emit_block("content_block_delta", delta={"type": "text_delta", "text": found.text})
            case ToolCallStart():
                self._begin(ToolUseBlock(id=found.call_id, name=found.name))
            case ToolArgumentsDelta():
                self._arguments += found.arguments
                delta = {"type": "input_json_delta", "partial_json": found.arguments}
                self._emit_block("content_block_delta", delta=delta)

    def _begin(self, block: TextBlock | ToolUseBlock) -> None:
        self._close()
        self._blocks.append(block)
        self._is_open, self._arguments = True, ""
        self._emit_block("content_block_start", content_block=block)

    def _close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if isinstance(block := self._blocks[-1], ToolUseBlock):
            # The message's stop_reason says whether it was cut.
            block.input = msgspec.Raw(dump(read_cut_object(self._arguments)).encode())
        self._emit_block("content_block_stop")

    def _emit_block(self, kind: str, **fields: object) -> None:
        self._emit(kind, index=len(self._blocks) - 1, **fields)

    def _usage(self, usage: Usage | None) -> MessagesUsage:
        num_cached = 0 if usage is None else usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(
            input_tokens=self.spec.num_prompt_tokens - num_cached,
            output_tokens=0 if usage is None else usage.completion_tokens,
            cache_read_input_tokens=num_cached,
        )

    def _response(self, usage: Usage | None) -> MessagesResponse:
        return MessagesResponse(
            id=self.spec.response_id,
            model=self.spec.model,
            content=list(self._blocks),
            stop_reason=None if usage is None else self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._usage(usage),
        )
