"""From what Python callers pass as prompt or messages to a checked request, by the code behind the HTTP routes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import msgspec

from megatron_medha.python_api.api_errors import RequestError, invalid_fields
from megatron_medha.python_api.sampling_params import SamplingParams
from megatron_medha.server.api_keys import LOCAL_ADMIN
from megatron_medha.server.bodies.openai_types import ChatRequest, CompletionRequest, SharedFields
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.openai.chat_completions import chat_spec
from megatron_medha.server.openai.completions import completion_spec
from megatron_medha.server.openai.request_fields import RequestContext
from megatron_medha.server.service import Service

PromptInput: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
Conversation: TypeAlias = "Sequence[Mapping[str, Any]]"

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_CHAT_FIELDS = (
    "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools", "tool_choice",
    "parallel_tool_calls", "documents", "reasoning_effort",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSource:
    """One request as the caller gave it."""

    prompt: str | array[int] | None = None
    chat: ChatRequest | None = None  # instead of a prompt: its messages, and what else is of chats only
    params: SamplingParams
    name: str | None = None  # None: the id that the engine uses

    async def spec(self, service: Service) -> GenerationSpec:
        """Checked and encoded, with the prompt's text; ApiError says what is wrong."""
        params = self.params
        context = RequestContext(
            ready=service.ready(),
            arrival_s=service.engine.now_s(),
            key=LOCAL_ADMIN,
            address=LOCAL_ADMIN.name,
            ttft_s=params.ttft_slo_s,
            tpot_s=params.tpot_slo_s,
            slo_class=_slo_class(service, params),
        )
        shared = params.shared_fields()
        fields = {name: getattr(shared, name) for name in SharedFields.__struct_fields__}
        if self.chat is None:
            assert self.prompt is not None
            # An array is what a long list of ids in a body is read as.
            prompt: Any = self.prompt
            body = CompletionRequest(
                **fields, prompt=prompt, logprobs=params.num_logprobs, echo=params.prompt_logprobs is not None
            )
            return await completion_spec(service, context, body, keeps_text=True)
        if params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: only of prompts, not of chats", "prompt_logprobs")
        chat = msgspec.structs.replace(
            self.chat, **fields, logprobs=params.logprobs is not None, top_logprobs=params.logprobs
        )
        return await chat_spec(service, context, chat, id_prefix="chatcmpl", keeps_text=True)


def prompt_sources(
    prompts: PromptInput | Sequence[PromptInput], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[RequestSource]:
    """A source for each prompt. RequestError names the place of one that is none."""
    each = [prompts] if _is_one_prompt(prompts) else list(prompts)
    return [
        _prompt_source(prompt, one, f"prompts[{place}]")  # type: ignore[arg-type]  # it says so if it is none
        for place, (prompt, one) in enumerate(zip(each, _params_of(params, len(each)), strict=True))
    ]


def chat_sources(
    messages: Conversation | Sequence[Conversation],
    params: SamplingParams | Sequence[SamplingParams] | None,
    fields: Mapping[str, Any],
    name: str | None = None,
) -> list[RequestSource]:
    """A source for each conversation; fields: of a chat's body, for all of them."""
    is_one = bool(messages) and isinstance(messages[0], Mapping)
    each: list[Any] = [messages] if is_one else list(messages)
    if unknown := sorted(set(fields) - set(_CHAT_FIELDS)):
        raise TypeError(f"unexpected keyword argument '{unknown[0]}'; a chat has {', '.join(_CHAT_FIELDS)}")
    given = {name: value for name, value in fields.items() if value is not None}
    sources = []
    for conversation, one in zip(each, _params_of(params, len(each)), strict=True):
        try:
            chat = msgspec.convert({**given, "messages": conversation}, ChatRequest)
        except msgspec.ValidationError as error:
            raise invalid_fields(error) from None
        sources.append(RequestSource(chat=chat, params=one, name=name))
    return sources


def source_of(
    prompt_or_messages: PromptInput | Conversation,
    params: SamplingParams | None,
    fields: Mapping[str, Any],
    name: str | None = None,
) -> RequestSource:
    """Of a prompt, or of messages: a list of mappings."""
    is_chat = (
        isinstance(prompt_or_messages, Sequence)
        and not isinstance(prompt_or_messages, str)
        and bool(prompt_or_messages)
        and isinstance(prompt_or_messages[0], Mapping)
    )
    if is_chat:
        return chat_sources(prompt_or_messages, params, fields, name)[0]  # type: ignore[arg-type]
    if fields:
        raise TypeError(f"unexpected keyword argument '{next(iter(fields))}' for a prompt")
    source = _prompt_source(prompt_or_messages, params or SamplingParams(), "prompt")  # type: ignore[arg-type]
    return replace(source, name=name)


def _is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str | Mapping | array) or (
        isinstance(prompts, Sequence) and bool(prompts) and all(isinstance(item, int) for item in prompts)
    )


def _prompt_source(prompt: PromptInput, params: SamplingParams, place: str) -> RequestSource:
    if isinstance(prompt, Mapping):
        unknown = sorted(set(prompt) - set(_PROMPT_KEYS))
        if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            what = f"`{unknown[0]}` is none of its keys" if unknown else "one of the first two is needed"
            raise RequestError(f"{place}: {what}; a prompt may have {', '.join(_PROMPT_KEYS)}", place)
        if (salt := prompt.get("cache_salt")) is not None:
            params = replace(params, cache_salt=salt)
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
    given: Any = prompt
    if isinstance(given, str | array):
        return RequestSource(prompt=given, params=params)
    try:
        return RequestSource(prompt=array("i", given), params=params)
    except (TypeError, OverflowError):
        kind = type(given).__name__
        raise RequestError(f"{place}: expected text, token ids or a mapping with either, got {kind}", place) from None


def _params_of(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num
    if len(params) != num:
        raise RequestError(f"{len(params)} sampling_params for {num} prompts; give one, or one for each")
    return list(params)


def _slo_class(service: Service, params: SamplingParams) -> str | None:
    name = params.slo_class
    if name is not None and name not in service.slo.names:
        raise RequestError(f"slo_class={name}: expected one of {', '.join(service.slo.names)}", "slo_class")
    return name
