"""/v1/responses: a chat in other words. Nothing is stored, so nothing can be referred to."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

from megatron_medha.server.chat import plan_chat
from megatron_medha.server.errors import ApiError, ErrorBody, bad_request, error_type
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.openai_types import (
    CalledFunction,
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    JsonSchemaFormat,
    Message,
    NamedFunction,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
    Usage,
)
from megatron_medha.server.request_fields import Wishes, refuse_all
from megatron_medha.server.responses_types import (
    IncompleteDetails,
    InputItem,
    InputPart,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseEvent,
    ResponsesRequest,
    ResponseToolChoice,
    ResponseUsage,
    TextFormat,
    TextOptions,
)
from megatron_medha.server.service import Ready, Service
from megatron_medha.server.tool_calls import CallBegan, CallFinder, CallWent, Found, Said
from megatron_medha.server.wire_format import encode_json

DECODER = msgspec.json.Decoder(ResponsesRequest)

# What we cannot do, what it may be all the same, and the way out.
_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("previous_response_id", (None,), "answers are not stored here; send the earlier messages and answers in input"),
    ("conversation", (None,), "conversations are not stored here; send the earlier messages and answers in input"),
    ("store", (None, False), "answers are not stored here; send store=false or leave it away"),
    ("background", (None, False), "answers are not stored here; stream this one, or send it with medha run-batch"),
    ("prompt", (None,), "there are no stored prompts here; send instructions and input"),
    ("include", (None, []), "there is nothing more to include"),
    ("reasoning", (None, {}), "not supported; models that reason do so in their text"),
    ("truncation", (None, "disabled"), "input is never cut here; only `disabled` is supported"),
    ("top_logprobs", (None, 0), "not supported here; /v1/chat/completions has them"),
    ("max_tool_calls", (None,), "not supported; parallel_tool_calls=false allows one"),
)
# Fields of chats in the words of this route.
_NAMES = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema", "response_format.type": "text.format.type",
}  # fmt: skip


async def plan_response(
    service: Service, ready: Ready, body: ResponsesRequest, wishes: Wishes, arrival_s: float
) -> GenerationSpec:
    """As plan_chat, of the chat that this is; ApiError 4xx says what is wrong."""
    refuse_all(body, _REFUSED)
    try:
        # Ranges are those of chats, and checked as those are.
        chat = msgspec.convert(msgspec.to_builtins(_as_chat(body)), ChatRequest)
        return await plan_chat(service, ready, chat, wishes, arrival_s, id_prefix="resp")
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`")
        raise bad_request(f"{name}: {what[0].lower()}{what[1:]}", name or None) from None
    except ApiError as error:
        if error.param in _NAMES:
            error.message = error.message.replace(error.param, _NAMES[error.param])
            error.param = _NAMES[error.param]
        raise


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    else:
        for place, item in enumerate(body.input):
            _add_item(messages, place, item)
    tool_choice = body.tool_choice
    return ChatRequest(
        messages=messages,
        model=body.model,
        stream=body.stream,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        priority=body.priority,
        service_tier=body.service_tier,
        user=body.user,
        response_format=_format_of(body.text),
        tools=None if body.tools is None else [
            Tool(type=tool.type, function=FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict,
            ))
            for tool in body.tools
        ],
        tool_choice=ToolChoice(type=tool_choice.type, function=NamedFunction(name=tool_choice.name))
        if isinstance(tool_choice, ResponseToolChoice) else tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )  # fmt: skip


def _format_of(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    given = text.format
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(name=given.name, schema=given.schema))


def _add_item(messages: list[Message], place: int, item: InputItem) -> None:
    param = f"input[{place}]"
    match item:
        case InputItem(type="message", role=str(role), content=str() | list() as content):
            messages.append(Message(role=role, content=_text_of(content, f"{param}.content")))
        case InputItem(type="function_call", call_id=str(call_id), name=str(name), arguments=str(arguments)):
            call = ToolCall(id=call_id, function=CalledFunction(name=name, arguments=arguments))
            last = messages[-1] if messages else None
            # Calls of one answer are one message of the model, with what it said before them.
            if last is not None and last.role == "assistant":
                last.tool_calls = [*(last.tool_calls or []), call]
            else:
                messages.append(Message(role="assistant", tool_calls=[call]))
        case InputItem(type="function_call_output", call_id=str(call_id), output=str() | list() as output):
            text = _text_of(output, f"{param}.output")
            messages.append(Message(role="tool", content=text, tool_call_id=call_id))
        case InputItem(type="message" | "function_call" | "function_call_output"):
            raise bad_request(f"{param}: a {item.type} lacks some of its fields", param)
        case _:
            raise bad_request(
                f"{param}.type: expected message, function_call or function_call_output, got `{item.type[:40]}`",
                f"{param}.type", "unsupported_parameter",
            )  # fmt: skip


def _text_of(content: str | list[InputPart], param: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise bad_request(f"{param}: only parts of type input_text and output_text, each with its text", param)
    return [ContentPart(type="text", text=part.text) for part in content]


class ResponsesFormat:
    """JSON of /v1/responses: items of output, which a stream builds before the client's eyes."""

    def __init__(self, spec: GenerationSpec, body: ResponsesRequest) -> None:
        self._spec = spec
        self._body = body
        self._finder = None if spec.tools is None else CallFinder(spec.tools)
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._finish_reason: str | None = None
        self._num_events = 0
        self._events: list[bytes] = []

    def opening_events(self) -> Sequence[bytes]:
        """That there is an answer, and that it is being made."""
        self._tell("response.created", response=self._answer("in_progress", None))
        self._tell("response.in_progress", response=self._answer("in_progress", None))
        return self._take_events()

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """Events of one token: of what the text so far has become."""
        self._push(piece)
        return b"".join(self._take_events())

    def closing_events(self, usage: Usage) -> Sequence[bytes]:
        """The whole answer once more."""
        status = self._status
        self._tell(f"response.{status}", response=self._answer(status, usage))
        return self._take_events()

    def error_events(self, error: ApiError) -> Sequence[bytes]:
        """The error in place of what would have followed."""
        body = ErrorBody(error.message, error_type(error.status), error.param, error.code)
        self._tell("error", code=error.code, message=error.message, param=error.param, error=body)
        return self._take_events()

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The answer that is not a stream."""
        for piece in pieces_by_choice[0]:
            self._push(piece)
        return encode_json(self._answer(self._status, usage))

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _push(self, piece: Piece) -> None:
        found: list[Found] = self._finder.push(piece.text) if self._finder is not None else [Said(piece.text)]
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            found += self._finder.finish() if self._finder is not None else []
            if not (self._items or found):
                found = [Said("")]
        for one in found:
            self._add(one)
        if piece.finish_reason is not None:
            self._close()

    def _add(self, found: Found) -> None:
        match found:
            case Said():
                message = self._open
                if not isinstance(message, OutputMessage):
                    message = OutputMessage(id=_draw_id("msg"), content=[])
                    self._begin(message)
                    message.content.append(OutputText())
                    self._tell_item("response.content_part.added", content_index=0, part=OutputText())
                if found.text:
                    message.content[0].text += found.text
                    self._tell_item("response.output_text.delta", content_index=0, delta=found.text, logprobs=[])
            case CallBegan():
                self._begin(OutputCall(id=_draw_id("fc"), call_id=found.call_id, name=found.name))
            case CallWent():
                assert isinstance(self._open, OutputCall), "a call goes on that has not begun"
                self._open.arguments += found.arguments
                self._tell_item("response.function_call_arguments.delta", delta=found.arguments)

    def _begin(self, item: OutputItem) -> None:
        self._close()
        self._items.append(item)
        self._open = item
        self._tell("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> None:
        item = self._open
        if item is None:
            return
        is_last_cut = self._finish_reason == "length"
        match item:
            case OutputMessage():
                part = item.content[0]
                self._tell_item("response.output_text.done", content_index=0, text=part.text, logprobs=[])
                self._tell_item("response.content_part.done", content_index=0, part=part)
            case OutputCall():
                self._tell_item("response.function_call_arguments.done", arguments=item.arguments, name=item.name)
        item.status = "incomplete" if is_last_cut else "completed"
        self._tell("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None

    def _tell_item(self, kind: str, **fields: object) -> None:
        assert self._open is not None
        self._tell(kind, item_id=self._open.id, output_index=len(self._items) - 1, **fields)

    def _tell(self, kind: str, **fields: object) -> None:
        if self._spec.is_stream:
            event = ResponseEvent(type=kind, sequence_number=self._num_events, **fields)  # type: ignore[arg-type]
            self._num_events += 1
            self._events.append(b"event: " + kind.encode() + b"\ndata: " + encode_json(event) + b"\n\n")

    def _take_events(self) -> list[bytes]:
        events, self._events = self._events, []
        return events

    def _answer(self, status: str, usage: Usage | None) -> ResponseAnswer:
        spec, body = self._spec, self._body
        return ResponseAnswer(
            id=spec.answer_id,
            created_at=spec.created,
            status=status,
            model=spec.model,
            output=list(self._items),
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=spec.sampling.temperature,
            text=TextOptions(format=(body.text and body.text.format) or TextFormat(type="text")),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_p=spec.sampling.top_p,
            usage=None if usage is None else ResponseUsage(
                input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
            ),
            user=body.user,
        )  # fmt: skip


def _draw_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
