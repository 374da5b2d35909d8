"""/v1/chat/completions: from messages to a GenerationSpec, and from pieces to its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from megatron_medha.server.bodies.openai_types import (
    AnswerMessage,
    CalledFunction,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ContentPart,
    Delta,
    FunctionDelta,
    Message,
    TokenizeRequest,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.openai.build_spec import Particulars, plan
from megatron_medha.server.openai.openai_logprobs import TokenNamer, chat_logprobs, chat_token, token_namer
from megatron_medha.server.openai.prompts import RawPrompt
from megatron_medha.server.openai.request_fields import Wishes, num_choices_of, refuse_all
from megatron_medha.server.openai.wire_format import (
    DONE_EVENT,
    MARK,
    EventTemplate,
    as_sliced_json,
    encode_json,
    error_events,
    sse_event,
)
from megatron_medha.server.ready import Ready
from megatron_medha.server.service import Service
from megatron_medha.server.text_piece import Piece
from megatron_medha.server.tools.call_readers import CallBegan, CallWent, Found, Said
from megatron_medha.server.tools.json_text import read_cut_object
from megatron_medha.server.tools.tool_calls import CallFinder
from megatron_medha.server.tools.tool_description import SYSTEM_ROLES, with_description
from megatron_medha.server.tools.tool_fields import ToolUse, definitions_of, syntax_of, tool_use, usable_tools
from megatron_medha.text.call_syntax import CallSyntax, reasoning_end
from megatron_medha.text.chat_template import ChatTemplateError
from megatron_medha.text.tokenizer import Tokenizer

BODY = BodyType(msgspec.json.Decoder(ChatRequest), texts=frozenset({"messages"}))
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")

# As far as time goes, a message is worth so many characters of text, however empty it is.
CHARS_PER_MESSAGE = 50
# What we cannot do, what it may be all the same, and the way out.
_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("functions", (None, []), "send them as tools"),
    ("echo", (None, False), "not supported here; continue_final_message goes on with what was said"),
    ("modalities", (None, ["text"]), "answers are text"),
)


async def plan_chat(
    service: Service,
    ready: Ready,
    body: ChatRequest,
    wishes: Wishes,
    arrival_s: float,
    *,
    id_prefix: str = "chatcmpl",
    ignored: Sequence[str] = (),
) -> GenerationSpec:
    """Check a request, render its messages and encode them; ApiError 4xx says what is wrong.

    ignored: what a route has left out of the request already, by its names.
    """
    config = service.config
    refuse_all(body, _REFUSED)
    usable = usable_tools(body.tools, body.tool_choice)
    tools = chat_tools(service, ready, usable.tools, usable.choice, body.parallel_tool_calls)
    n = num_choices_of(body, config)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs: only together with logprobs=true", "top_logprobs")
    max_tokens, max_tokens_param = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        max_tokens, max_tokens_param = body.max_completion_tokens, "max_completion_tokens"
    if max_tokens == 0:
        raise bad_request(f"{max_tokens_param}: expected at least 1", max_tokens_param)

    rendered = RenderedChat("")

    async def read_prompts() -> Sequence[RawPrompt]:
        nonlocal rendered
        rendered = await render_messages(service, ready, body.messages, body, definitions_of(tools))
        return [rendered.text]

    spec = await plan(
        service,
        ready,
        body,
        wishes,
        arrival_s,
        Particulars(
            id_prefix=id_prefix,
            num_prompts=1,
            read_prompts=read_prompts,
            prompt_param="messages",
            add_special_tokens=adds_special_tokens(ready, body.add_special_tokens),
            n=n,
            num_drawn=n,
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            logprobs_param="top_logprobs",
            tools=tools,
            ignored=(*ignored, *usable.ignored),
        ),
    )
    spec = replace(spec, ignored=(*spec.ignored, *rendered.ignored))
    if spec.tools is None:
        return spec
    end = reasoning_end(rendered.text, _text_continued(body))
    return replace(spec, tools=replace(spec.tools, reasoning_end=end))


def _text_continued(body: ChatRequest) -> str:
    content = body.messages[-1].content if body.continue_final_message else ""
    return content if isinstance(content, str) else "\n".join(part.text or "" for part in content or ())


def chat_tools(
    service: Service,
    ready: Ready,
    tools: Sequence[Tool] | None,
    choice: ToolChoice | str | None,
    is_parallel: bool | None,
) -> ToolUse | None:
    """How an answer may call tools, with this model; ApiError 400 for what does not fit."""
    syntax = syntax_of(service.config.tool_syntax, ready.tokenizer.template)
    return tool_use(tools, choice, is_parallel=is_parallel, syntax=syntax or CallSyntax.HERMES)


class RenderedChat(NamedTuple):
    """A prompt's text, and the fields of the request that are not in it."""

    text: str
    ignored: tuple[str, ...] = ()


async def render_messages(
    service: Service,
    ready: Ready,
    messages: list[Message],
    fields: ChatRequest | TokenizeRequest,
    tools: Sequence[dict[str, Any]] = (),
) -> RenderedChat:
    """The prompt; ApiError 400 for messages that are none, or that the template refuses."""
    if fields.chat_template is not None:
        # Templates are programs, and a client's could loop for ever.
        raise bad_request("chat_template: only the checkpoint's own", "chat_template", "unsupported_parameter")
    continues = bool(fields.continue_final_message)
    adds_prompt = fields.add_generation_prompt
    if continues and adds_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    if not messages:
        raise bad_request("messages: expected at least one message, got an empty list", "messages")
    limit = ready.facts.max_request_tokens
    if len(messages) > limit:
        raise bad_request(
            f"messages: {len(messages)} of them cannot fit the {limit} tokens that prompt and output together may have",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    extra = dict(fields.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        if name in extra:
            param = f"chat_template_kwargs.{name}"
            raise bad_request(f"{param}: send it as a field of the request, {name}", param)
    if fields.documents and not ready.tokenizer.template.uses_documents:
        raise bad_request(
            "documents: this model's chat template has no place for them; put their text into a message", "documents",
            "unsupported_parameter",
        )  # fmt: skip
    for name in ("documents", "reasoning_effort"):
        if (value := getattr(fields, name)) is not None:
            extra.setdefault(name, value)

    template = ready.tokenizer.template
    describes = bool(tools) and syntax_of(service.config.tool_syntax, template) is None

    def plain() -> Iterable[dict[str, Any]]:
        made = (_plain_message(place, message) for place, message in enumerate(messages))
        return with_description(made, tools) if describes else made

    options = {
        "add_generation_prompt": not continues and adds_prompt is not False,
        "continue_final_message": continues,
        "tools": () if describes else tuple(tools),
        "extra": extra,
    }
    num_chars = len(msgspec.json.encode(extra)) + sum(map(_num_chars, messages))
    try:
        return RenderedChat(await service.render(template, plain(), options, num_chars))
    except ChatTemplateError as error:
        refusal = error
    if fields.reasoning_effort is not None and template.uses_reasoning_effort:
        # Clients send one of OpenAI's efforts always; some templates refuse those that their model has not learned.
        options["extra"] = {name: value for name, value in extra.items() if name != "reasoning_effort"}
        with suppress(ChatTemplateError):
            return RenderedChat(await service.render(template, plain(), options, num_chars), ("reasoning_effort",))
    num_added = describes and messages[0].role not in SYSTEM_ROLES
    place = None if refusal.place is None else refusal.place - num_added
    param = "messages" if place is None or place < 0 else f"messages[{place}]"
    raise bad_request(f"{param}: {refusal}", param)


def _num_chars(message: Message) -> int:
    content = message.content
    parts = sum(len(part.text or "") + CHARS_PER_MESSAGE for part in content) if isinstance(content, list) else 0
    calls = sum(len(call.arguments) + CHARS_PER_MESSAGE for call in message.tool_calls or ())
    content_chars = len(content) if isinstance(content, str) else parts
    return CHARS_PER_MESSAGE + content_chars + calls + len(message.reasoning_content or "")


def adds_special_tokens(ready: Ready, asked: bool | None) -> bool:
    """Whether the tokenizer adds its special tokens to a rendered chat."""
    # A checkpoint's template writes its own; the plain one leaves them to the tokenizer.
    return ready.tokenizer.template.is_plain if asked is None else asked


def _plain_message(place: int, message: Message) -> dict[str, Any]:
    param = f"messages[{place}]"
    if message.role not in ROLES:
        raise bad_request(f"{param}.role: expected one of {', '.join(ROLES)}", f"{param}.role")
    content = message.content
    if isinstance(content, list):
        content = "\n".join(
            _text_of_part(part, f"{param}.content", index)
            for index, part in enumerate(content)
            # Models do not read the reasoning of earlier turns.
            if message.role != "assistant" or part.type not in _REASONING_PARTS
        )
    if content is None and message.role == "assistant" and not message.tool_calls:
        content = message.refusal or ""
    if content is None and message.role in ("tool", "function"):
        content = ""  # it returned nothing
    if content is None and message.role != "assistant":
        raise bad_request(f"{param}.content: expected text, got none", f"{param}.content")
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain["content"] = content
    for index, call in enumerate(message.tool_calls or ()):
        # Templates write arguments as JSON themselves, so they get them read. An answer's may have been cut.
        plain["tool_calls"][index]["function"]["arguments"] = read_cut_object(call.arguments)
    if not message.tool_calls:
        plain.pop("tool_calls", None)  # templates look whether it is there
    return plain


def _text_of_part(part: ContentPart, param: str, index: int) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal") or text is None:
        raise bad_request(
            f"{param}[{index}]: this server reads text alone; expected a part of type `text` with its text, got "
            f"`{part.type[:40]}`", param, "unsupported_content",
        )  # fmt: skip
    return text


class ChatFormat:
    """JSON of /v1/chat/completions."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._name: TokenNamer = token_namer(tokenizer, by_id=spec.names_tokens_by_id)
        self._num_top = spec.sampling.num_logprobs
        self._is_plain = not (
            self._num_top is not None or spec.has_continuous_usage or spec.returns_token_ids or spec.tools is not None
        )
        sample = ChatChunkChoice(index=0, delta=Delta(content=MARK))
        self._template = EventTemplate(spec, self._encode_event(sample, None))
        self._finders = [] if spec.tools is None else [CallFinder(spec.tools) for _ in range(spec.num_choices)]
        self._unsent: list[list[Piece]] = [[] for _ in self._finders]  # tokens whose text is in no event yet

    def opening_events(self) -> Sequence[bytes]:
        """For each choice an event that says who speaks, with no text yet."""
        opening = (
            ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
            for index in range(self._spec.num_choices)
        )
        return [self._encode_event(choice, None, is_opening=True) for choice in opening]

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """The event of one token. With tools: of what the text so far has become, which may be several or none."""
        if self._is_plain and piece.finish_reason is None:
            return self._template.fill(piece.choice_index, piece.text)
        if self._finders:
            return self._events_with_calls(piece, usage)
        return self._event([piece], Delta(content=piece.text), piece.finish_reason, usage)

    def closing_events(self, usage: Usage) -> Sequence[bytes]:
        """Usage where the client wants it, with no choices, and the end."""
        spec = self._spec
        if not spec.includes_usage:
            return (DONE_EVENT,)
        chunk = ChatChunk(id=spec.answer_id, created=spec.created, model=spec.model, choices=[], usage=usage)
        return sse_event(chunk), DONE_EVENT

    def error_events(self, error: ApiError) -> Sequence[bytes]:
        """The error in place of what would have followed."""
        return error_events(error)

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The answer that is not a stream."""
        spec = self._spec
        choices = []
        for index, pieces in enumerate(pieces_by_choice):
            finder = None if spec.tools is None else CallFinder(spec.tools)
            message = _message_of(pieces, finder)
            choices.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(pieces),
                    finish_reason=_finish_reason(pieces[-1], finder) or "",
                    stop_reason=pieces[-1].stop_reason,
                    token_ids=_token_ids(pieces) if spec.returns_token_ids else msgspec.UNSET,
                )
            )
        answer = ChatAnswer(
            id=spec.answer_id,
            created=spec.created,
            model=spec.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=self._prompt_ids(),
        )
        return encode_json(answer)

    def _events_with_calls(self, piece: Piece, usage: Usage | None) -> bytes:
        finder, unsent = self._finders[piece.choice_index], self._unsent[piece.choice_index]
        unsent.append(piece)
        found = finder.push(piece.text)
        if piece.finish_reason is not None:
            found += finder.end(piece)
        deltas = [_delta_of(one) for one in found]
        reason = _finish_reason(piece, finder)
        if reason is not None:
            deltas.append(Delta())
        events = []
        for place, delta in enumerate(deltas):
            is_last = place == len(deltas) - 1
            # What is said of tokens goes with the first event they become a part of.
            events.append(self._event(unsent[:], delta, reason if is_last else None, usage))
            unsent.clear()
            unsent += [] if is_last else [piece._replace(token_id=None)]
        return b"".join(events)

    def _event(
        self, pieces: Sequence[Piece], delta: Delta, finish_reason: str | None, usage: Usage | None
    ) -> bytes:
        last = pieces[-1]
        choice = ChatChunkChoice(
            index=last.choice_index,
            delta=delta,
            logprobs=self._logprobs(pieces),
            finish_reason=finish_reason,
            stop_reason=last.stop_reason if finish_reason is not None else msgspec.UNSET,
            token_ids=_token_ids(pieces) if self._spec.returns_token_ids else msgspec.UNSET,
        )
        return self._encode_event(choice, usage)

    def _encode_event(self, choice: ChatChunkChoice, usage: Usage | None, *, is_opening: bool = False) -> bytes:
        spec = self._spec
        chunk = ChatChunk(
            id=spec.answer_id,
            created=spec.created,
            model=spec.model,
            choices=[choice],
            usage=usage if usage is not None or spec.includes_usage else msgspec.UNSET,
            prompt_token_ids=self._prompt_ids() if is_opening else msgspec.UNSET,
        )
        return sse_event(chunk)

    def _prompt_ids(self) -> list[int] | msgspec.UnsetType:
        spec = self._spec
        return as_sliced_json(spec.prompts[0].token_ids) if spec.returns_token_ids else msgspec.UNSET

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        return chat_logprobs(
            [
                chat_token(piece.token_id, piece.logprobs, self._num_top, self._tokenizer, self._name)
                for piece in pieces
                if piece.token_id is not None and piece.logprobs is not None
            ]
        )


def _message_of(pieces: Sequence[Piece], finder: CallFinder | None) -> AnswerMessage:
    text = "".join(piece.text for piece in pieces)
    if finder is None:
        return AnswerMessage(content=text)
    content = ""
    calls: list[tuple[CallBegan, list[str]]] = []
    for found in [*finder.push(text), *finder.end(pieces[-1])]:
        match found:
            case Said():
                content += found.text
            case CallBegan():
                calls.append((found, []))
            case CallWent():
                calls[found.index][1].append(found.arguments)
    if not calls:
        return AnswerMessage(content=content)
    tool_calls = [
        ToolCall(id=began.call_id, function=CalledFunction(name=began.name, arguments="".join(arguments)))
        for began, arguments in calls
    ]
    return AnswerMessage(content=content or None, tool_calls=tool_calls)


def _delta_of(found: Found) -> Delta:
    match found:
        case Said():
            return Delta(content=found.text)
        case CallBegan():
            function = FunctionDelta(name=found.name, arguments="")
            call = ToolCallDelta(index=found.index, id=found.call_id, type="function", function=function)
        case CallWent():
            call = ToolCallDelta(index=found.index, function=FunctionDelta(arguments=found.arguments))
    return Delta(tool_calls=[call])


def _finish_reason(piece: Piece, finder: CallFinder | None) -> str | None:
    calls = finder is not None and finder.has_whole_calls and piece.finish_reason == "stop"
    return "tool_calls" if calls else piece.finish_reason


def _token_ids(pieces: Sequence[Piece]) -> list[int]:
    ids: list[int] = as_sliced_json([piece.token_id for piece in pieces if piece.token_id is not None])
    return ids
