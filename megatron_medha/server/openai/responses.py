"""/v1/responses: a chat in other words. Responses are not stored, so no request can go on from one by its id."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence

import msgspec

from megatron_medha.server.bodies.openai_types import ResponseFormat, TokenLogprob, Usage
from megatron_medha.server.bodies.responses_types import (
    IncompleteDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
    TextFormat,
    TextOptions,
)
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.http.http_errors import ApiError, ErrorBody, error_type
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.http.routing import encode_json
from megatron_medha.server.openai.block_format import BlockFormat
from megatron_medha.server.openai.chat_completions import chat_spec
from megatron_medha.server.openai.chat_prompt import CHARS_PER_MESSAGE, ConversationHistory
from megatron_medha.server.openai.openai_logprobs import chat_token, token_namer
from megatron_medha.server.openai.recent_items import RecentItems
from megatron_medha.server.openai.request_fields import RequestContext, refuse_all
from megatron_medha.server.openai.response_items import read_items
from megatron_medha.server.openai.response_tools import KnownTool, ResponseTools, add_tools, text_argument
from megatron_medha.server.service import Service
from megatron_medha.server.tools.call_readers import TextDelta, ToolArgumentsDelta, ToolCallStart, ToolParserEvent
from megatron_medha.text.tokenizer import Tokenizer

BODY = BodyType(msgspec.json.Decoder(ResponsesRequest), texts=frozenset({"input", "instructions"}))

LOGPROBS = "message.output_text.logprobs"  # of `include`; all else there is about items that responses here do not have
# What we cannot do, what it may be all the same, and the way out.
_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("previous_response_id", (None,), "answers are not stored here; send the earlier messages and answers in input"),
    ("conversation", (None,), "conversations are not stored here; send the earlier messages and answers in input"),
    ("background", (None, False), "answers are not stored here; stream this one, or send it with medha run-batch"),
    ("prompt", (None,), "there are no stored prompts here; send instructions and input"),
    ("n", (None, 1), "one answer at a time; /v1/chat/completions gives several"),
)
# Fields of chats in the words of this route.
_PATHS = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}  # fmt: skip


async def prepare_response(
    service: Service, context: RequestContext, body: ResponsesRequest, *, recent: RecentItems
) -> ResponsesFormat:
    """As chat_spec, of the chat that this is; ApiError 4xx says what is wrong. recent: items it may refer to."""
    refuse_all(body, _REFUSED)
    client = context.key.name

    def read() -> ConversationHistory:
        return read_items(body.input, body.instructions, lambda item_id: recent.find(client, item_id))

    num_items = 1 if isinstance(body.input, str) else len(body.input)
    history = await service.text.run(CHARS_PER_MESSAGE * num_items, read)
    tools = add_tools(history, body.tools, body.tool_choice)
    chat = history.request(
        body,
        max_completion_tokens=body.max_output_tokens,
        logprobs=bool(body.top_logprobs) or LOGPROBS in (body.include or ()),
        top_logprobs=body.top_logprobs,
        tool_choice=tools.choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    if (wanted := body.text.format if body.text else None) is not None:
        chat.response_format = ResponseFormat(type=wanted.type, schema=wanted.schema)
    with history.renamed_errors(_PATHS):
        spec = await chat_spec(service, context, chat, id_prefix="resp", ignored=history.ignored)
    return ResponsesFormat(spec, body, tools, context.ready.tokenizer, None if body.store is False else recent, client)


class ResponsesFormat(BlockFormat):
    """JSON of /v1/responses: items of output, which a stream builds before the client's eyes."""

    def __init__(
        self,
        spec: GenerationSpec,
        body: ResponsesRequest,
        tools: ResponseTools,
        tokenizer: Tokenizer,
        recent: RecentItems | None,
        client: str,
    ) -> None:
        """recent: where the items are kept for this client; None: nowhere."""
        super().__init__(spec)
        self._body = body
        self._tools = tools
        self._tokenizer = tokenizer
        self._name = token_namer(tokenizer, by_id=spec.names_tokens_by_id)
        self._recent = recent
        self._client = client
        self._unsent: list[TokenLogprob] = []  # of tokens whose text is in no event yet
        self._finish_reason: str | None = None
        self._sequence = itertools.count()

    def opening_events(self) -> Sequence[bytes]:
        """The response without its output."""
        self._emit("response.created", response=self._response(None))
        self._emit("response.in_progress", response=self._response(None))
        return self._take_events()

    def closing_events(self, usage: Usage) -> Sequence[bytes]:
        """The whole response."""
        self._emit(f"response.{self._status}", response=self._response(usage))
        return self._take_events()

    def error_events(self, error: ApiError) -> Sequence[bytes]:
        """The error in place of what would have followed."""
        body = ErrorBody(error.message, error_type(error.status), error.param, error.code)
        self._emit("error", code=error.code, message=error.message, param=error.param, error=body)
        return self._take_events()

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _push(self, piece: Piece) -> None:
        self._unsent += self._logprobs(piece)
        super()._push(piece)

    def _finish(self, piece: Piece) -> None:
        if not self._blocks:
            self._add(TextDelta(""))
        self._finish_reason = piece.finish_reason

    def _logprobs(self, piece: Piece) -> list[TokenLogprob]:
        if not self.spec.has_logprobs or piece.logprobs is None or piece.token_id is None:
            return []
        num_top = self.spec.sampling.num_logprobs or 0
        return [chat_token(piece.token_id, piece.logprobs, num_top, self._tokenizer, self._name)]

    def _add(self, found: ToolParserEvent) -> None:
        match found:
            case TextDelta():
                if not (self._is_open and isinstance(self._blocks[-1], OutputMessage)):
                    if self._blocks:  # the other tokens were a call's
                        self._unsent = _last_tokens(self._unsent, found.text)
                    self._begin(OutputMessage(id=_draw_id("msg"), content=[]))
                    self._blocks[-1].content.append(OutputText(logprobs=[]))
                    self._emit_item("response.content_part.added", content_index=0, part=OutputText())
                if found.text:
                    logprobs, self._unsent = self._unsent, []
                    part = self._blocks[-1].content[0]
                    part.text += found.text
                    part.logprobs += logprobs
                    self._emit_item(
                        "response.output_text.delta", content_index=0, delta=found.text, logprobs=logprobs
                    )
            case ToolCallStart():
                known = self._tools.known.get(found.name, KnownTool(found.name))
                call = OutputCall(
                    type="custom_tool_call" if known.is_custom else "function_call",
                    id=_draw_id("ctc" if known.is_custom else "fc"),
                    call_id=found.call_id,
                    name=known.name,
                    namespace=known.namespace or msgspec.UNSET,
                )
                if known.is_custom:
                    call.input = ""
                else:
                    call.arguments = ""
                self._begin(call)
            case ToolArgumentsDelta():
                self._arguments += found.arguments
                if self._blocks[-1].type == "function_call":
                    self._emit_item("response.function_call_arguments.delta", delta=found.arguments)

    def _begin(self, item: OutputMessage | OutputCall) -> None:
        self._close()
        self._blocks.append(item)
        self._is_open, self._arguments = True, ""
        self._emit("response.output_item.added", output_index=len(self._blocks) - 1, item=item)

    def _close(self) -> None:
        if not self._is_open:
            return
        item = self._blocks[-1]
        match item:
            case OutputMessage(content=[part]):
                self._emit_item("response.output_text.done", content_index=0, text=part.text, logprobs=part.logprobs)
                self._emit_item("response.content_part.done", content_index=0, part=part)
            case OutputCall(type="function_call"):
                item.arguments = self._arguments
                self._emit_item("response.function_call_arguments.done", arguments=item.arguments, name=item.name)
            case OutputCall():
                # Its text stands in JSON, which is read once it is whole.
                item.input = text_argument(self._arguments)
                self._emit_item("response.custom_tool_call_input.delta", delta=item.input)
                self._emit_item("response.custom_tool_call_input.done", input=item.input)
        is_stopped = self._finish_reason is not None and self._finder is not None and self._finder.is_last_cut
        item.status = "incomplete" if self._finish_reason == "length" or is_stopped else "completed"
        self._emit("response.output_item.done", output_index=len(self._blocks) - 1, item=item)
        self._is_open = False
        if self._recent is not None:
            self._recent.add(self._client, item.id, encode_json(item))

    def _emit_item(self, kind: str, **fields: object) -> None:
        self._emit(kind, item_id=self._blocks[-1].id, output_index=len(self._blocks) - 1, **fields)

    def _emit(self, kind: str, **fields: object) -> None:
        super()._emit(kind, sequence_number=next(self._sequence), **fields)

    def _response(self, usage: Usage | None) -> ResponsesResponse:
        spec, body = self.spec, self._body
        status = "in_progress" if usage is None else self._status
        return ResponsesResponse(
            id=spec.response_id,
            created_at=spec.created,
            status=status,
            model=spec.model,
            output=list(self._blocks),
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=spec.sampling.temperature,
            text=TextOptions(format=(body.text and body.text.format) or TextFormat(type="text")),
            tool_choice=body.tool_choice or "auto",
            tools=self._tools.shown,
            top_p=spec.sampling.top_p,
            usage=None if usage is None else ResponseUsage(
                input_tokens=usage.prompt_tokens, input_tokens_details=usage.prompt_tokens_details,
                output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens,
            ),
            user=body.user,
        )  # fmt: skip


def _last_tokens(tokens: list[TokenLogprob], text: str) -> list[TokenLogprob]:
    """Those of which this text consists, if it is the end of theirs."""
    num_bytes, place = len(text.encode()), len(tokens)
    while num_bytes > 0 and place:
        place -= 1
        num_bytes -= len(tokens[place].bytes or ())
    return tokens[place:]


def _draw_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
