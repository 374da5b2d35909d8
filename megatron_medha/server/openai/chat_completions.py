"""/v1/chat/completions: from messages to a GenerationSpec, and from pieces to its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from megatron_medha.server.bodies.openai_types import (
    CalledFunction,
    ChatChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
    ChatRequest,
    ResponseMessage,
    ToolCall,
    Usage,
)
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.http.routing import encode_json
from megatron_medha.server.openai.build_spec import begin_spec
from megatron_medha.server.openai.chat_prompt import adds_special_tokens, chat_tools, render_messages
from megatron_medha.server.openai.openai_logprobs import chat_token
from megatron_medha.server.openai.prompts import encode_prompts
from megatron_medha.server.openai.request_fields import RequestContext, refuse_all
from megatron_medha.server.openai.wire_format import MARK, EventTemplate, TokenFormat, as_sliced_json, sse_event
from megatron_medha.server.service import Service
from megatron_medha.server.tools.call_readers import TextDelta, ToolArgumentsDelta, ToolCallStart, ToolParserEvent
from megatron_medha.server.tools.tool_calls import ToolCallParser
from megatron_medha.server.tools.tool_fields import definitions_of, tools_left_out
from megatron_medha.text.chat.call_syntax import reasoning_end
from megatron_medha.text.tokenizer import Tokenizer

BODY = BodyType(msgspec.json.Decoder(ChatRequest), texts=frozenset({"messages"}))

# What we cannot do, what it may be all the same, and the way out.
_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("functions", (None, []), "send them as tools"),
    ("echo", (None, False), "not supported here; continue_final_message goes on with what was said"),
    ("modalities", (None, ["text"]), "answers are text"),
)


async def prepare_chat_completion(service: Service, context: RequestContext, body: ChatRequest) -> ChatFormat:
    """Check a request and encode its prompt; ApiError 4xx says what is wrong."""
    return ChatFormat(await chat_spec(service, context, body, id_prefix="chatcmpl"), context.ready.tokenizer)


async def chat_spec(
    service: Service,
    context: RequestContext,
    body: ChatRequest,
    *,
    id_prefix: str,
    ignored: Sequence[str] = (),
    keeps_text: bool = False,
) -> GenerationSpec:
    """What to generate for a chat, of whatever route; ApiError 4xx says what is wrong.

    ignored: what a route has left out of the request already, by its names. keeps_text: of the rendered prompt.
    """
    ready = context.ready
    refuse_all(body, _REFUSED)
    tools = chat_tools(service, ready, body.tools, body.tool_choice, body.parallel_tool_calls)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs: only together with logprobs=true", "top_logprobs")
    max_tokens, max_tokens_param = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        max_tokens, max_tokens_param = body.max_completion_tokens, "max_completion_tokens"
    if max_tokens == 0:
        raise bad_request(f"{max_tokens_param}: expected at least 1", max_tokens_param)
    spec = await begin_spec(
        service,
        context,
        body,
        id_prefix=id_prefix,
        n=body.n or 1,
        max_tokens=max_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logprobs_param="top_logprobs",
        tools=tools,
        ignored=(*ignored, *tools_left_out(body.tools)),
    )
    text, not_rendered = await render_messages(service, ready, body.messages, body, definitions_of(tools))
    prompts = await encode_prompts(
        service,
        ready,
        spec.prefix_root,
        [text],
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        add_special_tokens=adds_special_tokens(ready, body.add_special_tokens),
        param="messages",
        keeps_text=keeps_text,
    )
    tools = spec.tools
    if tools is not None:
        tools = replace(tools, reasoning_end=reasoning_end(text, _text_continued(body)))
    return replace(spec, prompts=prompts, tools=tools, ignored=(*spec.ignored, *not_rendered))


def _text_continued(body: ChatRequest) -> str:
    content = body.messages[-1].content if body.continue_final_message else ""
    return content if isinstance(content, str) else "\n".join(part.text or "" for part in content or ())


class ChatFormat(TokenFormat):
    """JSON of /v1/chat/completions."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer) -> None:
        super().__init__(spec, tokenizer)
        self._num_top = spec.sampling.num_logprobs
        self._is_plain = self._is_plain and spec.tools is None
        self._template = EventTemplate(spec, self._encode_event([_choice(0, {"content": MARK})], None))
        self._finders = [] if spec.tools is None else [ToolCallParser(spec.tools) for _ in range(spec.num_choices)]
        self._unsent: list[list[Piece]] = [[] for _ in self._finders]  # tokens whose text is in no event yet

    def opening_events(self) -> Sequence[bytes]:
        """For each choice an event that says who speaks, with no text yet."""
        delta = {"role": "assistant", "content": ""}
        choices = [_choice(index, delta) for index in range(self.spec.num_choices)]
        return [self._encode_event([choice], None, is_opening=True) for choice in choices]

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """The event of one token. With tools: of what the text so far has become, which may be several or none."""
        if self._is_plain and piece.finish_reason is None:
            return self._template.fill(piece.choice_index, piece.text)
        if self._finders:
            return self._events_with_calls(piece, usage)
        return self._event([piece], {"content": piece.text}, piece.finish_reason, usage)

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The response that is not a stream."""
        spec = self.spec
        choices = []
        for index, pieces in enumerate(pieces_by_choice):
            finder = None if spec.tools is None else ToolCallParser(spec.tools)
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
        answer = ChatCompletionResponse(
            id=spec.response_id,
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
            found += finder.end(piece.finish_reason, piece.stop_reason)
        deltas = [_delta_of(one) for one in found]
        reason = _finish_reason(piece, finder)
        if reason is not None:
            deltas.append({})
        events = []
        for place, delta in enumerate(deltas):
            is_last = place == len(deltas) - 1
            # What is said of tokens goes with the first event they become a part of.
            events.append(self._event(unsent[:], delta, reason if is_last else None, usage))
            unsent.clear()
            unsent += [] if is_last else [piece._replace(token_id=None)]
        return b"".join(events)

    def _event(
        self, pieces: Sequence[Piece], delta: dict[str, Any], finish_reason: str | None, usage: Usage | None
    ) -> bytes:
        choice = _choice(pieces[-1].choice_index, delta, self._logprobs(pieces), finish_reason)
        if finish_reason is not None:
            choice["stop_reason"] = pieces[-1].stop_reason
        if self.spec.returns_token_ids:
            choice["token_ids"] = _token_ids(pieces)
        return self._encode_event([choice], usage)

    def _encode_event(
        self, choices: list[dict[str, Any]], usage: Usage | None, *, is_opening: bool = False
    ) -> bytes:
        spec = self.spec
        chunk = ChatCompletionChunk(
            id=spec.response_id,
            created=spec.created,
            model=spec.model,
            choices=choices,
            usage=usage if usage is not None or spec.includes_usage else msgspec.UNSET,
            prompt_token_ids=self._prompt_ids() if is_opening else msgspec.UNSET,
        )
        return sse_event(chunk)

    def _prompt_ids(self) -> list[int] | msgspec.UnsetType:
        spec = self.spec
        return as_sliced_json(spec.prompts[0].token_ids) if spec.returns_token_ids else msgspec.UNSET

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        tokens = [
            chat_token(piece.token_id, piece.logprobs, self._num_top, self._tokenizer, self._name)
            for piece in pieces
            if piece.token_id is not None and piece.logprobs is not None
        ]
        return ChatLogprobs(content=as_sliced_json(tokens))


def _message_of(pieces: Sequence[Piece], finder: ToolCallParser | None) -> ResponseMessage:
    text = "".join(piece.text for piece in pieces)
    if finder is None:
        return ResponseMessage(content=text)
    content = ""
    calls: list[tuple[ToolCallStart, list[str]]] = []
    for found in [*finder.push(text), *finder.end(pieces[-1].finish_reason, pieces[-1].stop_reason)]:
        match found:
            case TextDelta():
                content += found.text
            case ToolCallStart():
                calls.append((found, []))
            case ToolArgumentsDelta():
                calls[found.index][1].append(found.arguments)
    if not calls:
        return ResponseMessage(content=content)
    tool_calls = [
        ToolCall(id=began.call_id, function=CalledFunction(name=began.name, arguments="".join(arguments)))
        for began, arguments in calls
    ]
    return ResponseMessage(content=content or None, tool_calls=tool_calls)


def _choice(
    index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """What one event adds to one choice."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _delta_of(found: ToolParserEvent) -> dict[str, Any]:
    match found:
        case TextDelta():
            return {"content": found.text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ToolArgumentsDelta(index, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def _finish_reason(piece: Piece, finder: ToolCallParser | None) -> str | None:
    calls = finder is not None and finder.has_whole_calls and piece.finish_reason == "stop"
    return "tool_calls" if calls else piece.finish_reason


def _token_ids(pieces: Sequence[Piece]) -> list[int]:
    ids: list[int] = as_sliced_json([piece.token_id for piece in pieces if piece.token_id is not None])
    return ids
