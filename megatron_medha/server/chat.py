"""/v1/chat/completions: from messages to a GenerationSpec, and from pieces to its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from megatron_medha.server.chat_template import ChatTemplateError
from megatron_medha.server.errors import bad_request
from megatron_medha.server.generation import GenerationSpec, Piece
from megatron_medha.server.logprobs import TokenNamer, chat_logprobs, chat_token, token_namer
from megatron_medha.server.openai_types import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    Delta,
    Message,
    TokenizeRequest,
    Usage,
)
from megatron_medha.server.prompts import encode_prompts
from megatron_medha.server.request_fields import (
    Wishes,
    check_common,
    check_num_logprobs,
    generation_spec,
    num_choices_of,
    sampling_of,
)
from megatron_medha.server.service import Ready, Service
from megatron_medha.server.tokens import Tokenizer
from megatron_medha.server.wire_format import MARK, EventTemplate, encode_json, sse_event

DECODER = msgspec.json.Decoder(ChatRequest)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


async def plan_chat(
    service: Service, ready: Ready, body: ChatRequest, wishes: Wishes, arrival_s: float
) -> GenerationSpec:
    """Check a request, render its messages and encode them; ApiError 4xx says what is wrong."""
    config = service.config
    model = service.model_name(body.model)
    check_common(body)
    if (body.tools or body.functions) and body.tool_choice != "none":
        raise bad_request("tools: tool calls are not supported", "tools", "unsupported_parameter")
    n = num_choices_of(body, config)
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise bad_request("top_logprobs: only together with logprobs=true", "top_logprobs")
        check_num_logprobs(body.top_logprobs, config, "top_logprobs")
    max_tokens, max_tokens_param = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        max_tokens, max_tokens_param = body.max_completion_tokens, "max_completion_tokens"
    if max_tokens == 0:
        raise bad_request(f"{max_tokens_param}: expected at least 1", max_tokens_param)
    sampling = sampling_of(
        body,
        ready,
        config,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        num_prompt_logprobs=None,
        max_tokens=max_tokens,
    )
    service.admission.check_places(config, n)
    text = await render_messages(service, ready, body.messages, body)
    prompts = await encode_prompts(
        service,
        ready,
        [text],
        max_tokens=max_tokens,
        default_max_tokens=None,
        add_special_tokens=adds_special_tokens(ready, body.add_special_tokens),
        param="messages",
        max_tokens_param=max_tokens_param,
    )
    return generation_spec(
        service,
        body,
        wishes,
        id_prefix="chatcmpl",
        model=model,
        arrival_s=arrival_s,
        prompts=prompts,
        n=n,
        sampling=sampling,
    )


async def render_messages(
    service: Service, ready: Ready, messages: list[Message], fields: ChatRequest | TokenizeRequest
) -> str:
    """The prompt's text; ApiError 400 for messages that are none, or that the template refuses."""
    if fields.chat_template is not None:
        # Templates are programs, and a client's could loop for ever.
        raise bad_request("chat_template: only the checkpoint's own", "chat_template", "unsupported_parameter")
    continues = bool(fields.continue_final_message)
    adds_prompt = fields.add_generation_prompt
    if continues and adds_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    plain = [_plain_message(place, message) for place, message in enumerate(messages)]
    if not plain:
        raise bad_request("messages: expected at least one message, got an empty list", "messages")

    def render() -> str:
        return ready.tokenizer.template.render(
            plain,
            add_generation_prompt=not continues and adds_prompt is not False,
            continue_final_message=continues,
            extra=fields.chat_template_kwargs,
        )

    num_chars = sum(len(message["content"] or "") for message in plain)
    try:
        return await service.work_on_text(num_chars, render)
    except ChatTemplateError as error:
        raise bad_request(f"messages: {error}", "messages") from None


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
        for part in content:
            if part.type != "text" or part.text is None:
                raise bad_request(
                    f"{param}.content: only parts of type `text`, each with its text, are supported", f"{param}.content"
                )
        content = "\n".join(part.text or "" for part in content)
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise bad_request(f"{param}.content: expected text, got none", f"{param}.content")
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain["content"] = content
    return plain


class ChatFormat:
    """JSON of /v1/chat/completions."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._name: TokenNamer = token_namer(tokenizer, by_id=spec.names_tokens_by_id)
        self._num_top = spec.sampling.num_logprobs
        self._is_plain = not (
            self._num_top is not None or spec.has_continuous_usage or spec.returns_token_ids
        )
        sample = ChatChunkChoice(index=0, delta=Delta(content=MARK))
        self._template = EventTemplate(spec, self._encode_event(sample, None))

    def opening_events(self) -> Sequence[bytes]:
        """For each choice an event that says who speaks, with no text yet."""
        opening = (
            ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
            for index in range(self._spec.num_choices)
        )
        return [self._encode_event(choice, None, is_opening=True) for choice in opening]

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """The event of one token."""
        if self._is_plain and piece.finish_reason is None:
            return self._template.fill(piece.choice_index, piece.text)
        choice = ChatChunkChoice(
            index=piece.choice_index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs([piece]),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason if piece.finish_reason is not None else msgspec.UNSET,
            token_ids=_token_ids([piece]) if self._spec.returns_token_ids else msgspec.UNSET,
        )
        return self._encode_event(choice, usage)

    def usage_event(self, usage: Usage) -> bytes:
        """The event after the last token: usage, and no choices."""
        spec = self._spec
        return sse_event(
            ChatChunk(id=spec.answer_id, created=spec.created, model=spec.model, choices=[], usage=usage)
        )

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The answer that is not a stream."""
        spec = self._spec
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content="".join(piece.text for piece in pieces)),
                logprobs=self._logprobs(pieces),
                finish_reason=pieces[-1].finish_reason or "",
                stop_reason=pieces[-1].stop_reason,
                token_ids=_token_ids(pieces) if spec.returns_token_ids else msgspec.UNSET,
            )
            for index, pieces in enumerate(pieces_by_choice)
        ]
        answer = ChatAnswer(
            id=spec.answer_id,
            created=spec.created,
            model=spec.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=self._prompt_ids(),
        )
        return encode_json(answer)

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
        return spec.prompts[0].token_ids.tolist() if spec.returns_token_ids else msgspec.UNSET

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


def _token_ids(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token_id for piece in pieces if piece.token_id is not None]
