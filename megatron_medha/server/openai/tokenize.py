"""/tokenize and /detokenize, in vLLM's shapes. Long responses are encoded by slices, on a thread."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterator

import msgspec
from starlette.responses import Response

from megatron_medha.server.bodies.openai_types import (
    ChatRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.http.routing import json_response
from megatron_medha.server.openai.chat_prompt import adds_special_tokens, chat_tools, render_messages
from megatron_medha.server.openai.prompts import as_ids, check_ids, check_length, encode_text
from megatron_medha.server.openai.wire_format import as_sliced_json
from megatron_medha.server.service import ReadyState, Service
from megatron_medha.server.tools.tool_fields import definitions_of
from megatron_medha.text.tokenizer import PieceKind, Tokenizer, TooManyTokens

TOKENIZE_BODY = BodyType(msgspec.json.Decoder(TokenizeRequest), texts=frozenset({"prompt", "messages"}))
DETOKENIZE_BODY = BodyType(msgspec.json.Decoder(DetokenizeRequest), ids=frozenset({"tokens"}))

_SLICE_IDS = 4_096  # made text at once


async def tokenize(service: Service, ready: ReadyState, body: TokenizeRequest) -> Response:
    """Token ids of a prompt, or of messages as the chat route would encode them."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt: expected either prompt or messages", "prompt")
    if body.prompt is None:
        ids = await chat_token_ids(service, ready, body)
    else:
        service.model_name(body.model)
        ids = await _token_ids(service, ready, body.prompt, body.add_special_tokens is not False, "prompt")

    def work() -> Response:
        names = [ready.tokenizer.token_name(token_id) for token_id in ids] if body.return_token_strs else None
        return json_response(TokenizeResponse(
            count=len(ids),
            max_model_len=ready.facts.max_request_tokens,
            tokens=as_sliced_json(ids),
            token_strs=None if names is None else as_sliced_json(names),
        ))  # fmt: skip

    return await service.text.run(len(ids), work)


async def chat_token_ids(service: Service, ready: ReadyState, body: TokenizeRequest | ChatRequest) -> array[int]:
    """The ids of a chat's prompt; ApiError 400 if they are more than the model's context."""
    service.model_name(body.model)
    tools = chat_tools(service, ready, body.tools, None, None)
    text, _ = await render_messages(service, ready, body.messages or [], body, definitions_of(tools))
    return await _token_ids(service, ready, text, adds_special_tokens(ready, body.add_special_tokens), "messages")


async def _token_ids(
    service: Service, ready: ReadyState, text: str, adds_special: bool, param: str
) -> array[int]:
    tokenizer, limit = ready.tokenizer, ready.facts.max_request_tokens
    check_length(tokenizer.min_num_tokens(text), limit, ready, service, param, is_exact=False)

    def work() -> array[int]:
        return encode_text(ready, text, adds_special, limit, param)

    try:
        ids = await service.text.run(len(text), work)
    except TooManyTokens as error:
        check_length(error.at_least, limit, ready, service, param, is_exact=False)
        raise
    check_length(len(ids), limit, ready, service, param)
    return ids


async def detokenize(service: Service, ready: ReadyState, body: DetokenizeRequest) -> Response:
    """Text of token ids, special tokens included; ApiError 400 beyond the context."""
    service.model_name(body.model)
    check_length(len(body.tokens), ready.facts.max_request_tokens, ready, service, "tokens")
    ids = as_ids(body.tokens, "tokens")
    tokenizer = ready.tokenizer

    def work() -> Response:
        if ids:
            check_ids(ids, ready.facts.shape.vocab_size, "tokens")
        return json_response(DetokenizeResponse(prompt=as_sliced_json("".join(_text_parts(tokenizer, ids)))))

    return await service.text.run(len(ids), work)


def _text_parts(tokenizer: Tokenizer, ids: array[int]) -> Iterator[str]:
    if tokenizer.kind is not PieceKind.BYTE_LEVEL:
        yield tokenizer.decode(ids, skip_special_tokens=False)
        return
    # The library makes 100 bytes of each id; the bytes of a byte-level token are known here.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for begin in range(0, len(ids), _SLICE_IDS):
        yield decoder.decode(b"".join(map(tokenizer.token_bytes, ids[begin : begin + _SLICE_IDS])))
    yield decoder.decode(b"", final=True)
