"""/tokenize and /detokenize, in vLLM's shapes. What is long is encoded and sent by slices."""

from __future__ import annotations

import asyncio
import codecs
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec
from starlette.responses import Response, StreamingResponse

from megatron_medha.server.bodies.openai_types import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.http.routing import encode_json, json_response
from megatron_medha.server.openai.chat_prompt import adds_special_tokens, chat_tools, render_messages
from megatron_medha.server.openai.prompts import as_ids, check_ids, check_length, encode_text
from megatron_medha.server.service import ReadyState, Service
from megatron_medha.server.tools.tool_fields import definitions_of
from megatron_medha.text.tokenizer import PieceKind, Tokenizer, TooManyTokens

TOKENIZE_BODY = BodyType(msgspec.json.Decoder(TokenizeRequest), texts=frozenset({"prompt", "messages"}))
DETOKENIZE_BODY = BodyType(msgspec.json.Decoder(DetokenizeRequest), ids=frozenset({"tokens"}))

_SLICE_IDS = 4_096     # encoded on the event loop at once: 1 ms, with their names 3 ms
_SLICE_CHARS = 65_536


async def tokenize(service: Service, ready: ReadyState, body: TokenizeRequest) -> Response:
    """Token ids of a prompt, or of messages as the chat route would encode them."""
    ids = await token_ids_of(service, ready, body)
    limit = ready.facts.max_request_tokens
    names = ready.tokenizer if body.return_token_strs else None
    if len(ids) > _SLICE_IDS:
        return _streamed(_token_parts(ids, limit, names))
    answer = TokenizeResponse(
        count=len(ids), max_model_len=limit, tokens=ids.tolist(), token_strs=_names(names, ids) if names else None
    )
    return json_response(answer)


async def token_ids_of(service: Service, ready: ReadyState, body: TokenizeRequest) -> array[int]:
    """The ids of what the body holds; ApiError 400 if they are more than the model's context."""
    service.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt: expected either prompt or messages", "prompt")
    if body.messages is not None:
        tools = chat_tools(service, ready, body.tools, None, None)
        text = (await render_messages(service, ready, body.messages, body, definitions_of(tools))).text
        adds_special = adds_special_tokens(ready, body.add_special_tokens)
    else:
        text = body.prompt or ""
        adds_special = body.add_special_tokens is not False
    param = "prompt" if body.messages is None else "messages"
    tokenizer, limit = ready.tokenizer, ready.facts.max_request_tokens
    check_length(tokenizer.min_num_tokens(text), limit, ready, service, param, is_exact=False)

    def work() -> array[int]:
        return encode_text(tokenizer, text, adds_special, limit, param)

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

    def work() -> list[str]:
        check_ids(ids, ready.facts.shape.vocab_size, "tokens")
        return list(_text_parts(tokenizer, ids))

    texts = await service.text.run(len(ids), work) if ids else []
    if len(ids) > _SLICE_IDS:
        return _streamed(_quoted(texts))
    return json_response(DetokenizeResponse(prompt="".join(texts)))


def _streamed(parts: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(_one_by_one(parts), media_type="application/json")


async def _one_by_one(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for part in parts:
        yield part
        await asyncio.sleep(0)  # sending waits only where the client reads slowly


async def _token_parts(ids: array[int], limit: int, names: Tokenizer | None) -> AsyncIterator[bytes]:
    """A TokenizeResponse as JSON."""
    yield b'{"count":%d,"max_model_len":%d,"tokens":[' % (len(ids), limit)
    for begin in range(0, len(ids), _SLICE_IDS):
        yield (b"," if begin else b"") + encode_json(ids[begin : begin + _SLICE_IDS].tolist())[1:-1]
    if names is None:
        yield b'],"token_strs":null}'
        return
    yield b'],"token_strs":['
    for begin in range(0, len(ids), _SLICE_IDS):
        yield (b"," if begin else b"") + encode_json(_names(names, ids[begin : begin + _SLICE_IDS]))[1:-1]
    yield b"]}"


async def _quoted(texts: Sequence[str]) -> AsyncIterator[bytes]:
    """A DetokenizeResponse as JSON."""
    yield b'{"prompt":"'
    for text in texts:
        for begin in range(0, len(text), _SLICE_CHARS):
            yield encode_json(text[begin : begin + _SLICE_CHARS])[1:-1]
    yield b'"}'


def _names(tokenizer: Tokenizer, ids: array[int]) -> list[str]:
    return [tokenizer.token_name(token_id) for token_id in ids]


def _text_parts(tokenizer: Tokenizer, ids: array[int]) -> Iterator[str]:
    if tokenizer.kind is not PieceKind.BYTE_LEVEL:
        yield tokenizer.decode(ids, skip_special_tokens=False)
        return
    # The library makes 100 bytes of each id; the bytes of a byte-level token are known here.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for begin in range(0, len(ids), _SLICE_IDS):
        yield decoder.decode(b"".join(map(tokenizer.token_bytes, ids[begin : begin + _SLICE_IDS])))
    yield decoder.decode(b"", final=True)
