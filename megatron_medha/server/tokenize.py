"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from array import array

import msgspec

from megatron_medha.server.chat import adds_special_tokens, chat_tools, render_messages
from megatron_medha.server.errors import bad_request
from megatron_medha.server.openai_types import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from megatron_medha.server.prompts import check_ids
from megatron_medha.server.service import Ready, Service
from megatron_medha.server.tools import definitions_of, usable_tools

TOKENIZE_DECODER = msgspec.json.Decoder(TokenizeRequest)
DETOKENIZE_DECODER = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(service: Service, ready: Ready, body: TokenizeRequest) -> TokenizeAnswer:
    """Token ids of a prompt, or of messages as the chat route would encode them."""
    service.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt: expected either prompt or messages", "prompt")
    if body.messages is not None:
        usable = usable_tools(body.tools, None)
        tools = chat_tools(service, ready, usable.tools, "required" if usable.tools else None, None)
        text = await render_messages(service, ready, body.messages, body, definitions_of(tools))
        adds_special = adds_special_tokens(ready, body.add_special_tokens)
    else:
        text = body.prompt or ""
        adds_special = body.add_special_tokens is not False
    tokenizer = ready.tokenizer

    def work() -> TokenizeAnswer:
        ids = tokenizer.encode(text, add_special_tokens=adds_special)
        return TokenizeAnswer(
            count=len(ids),
            max_model_len=ready.facts.max_request_tokens,
            tokens=ids.tolist(),
            # Of a long text as slow as the encoding, and no work for the loop that serves tokens either.
            token_strs=[tokenizer.token_name(token_id) for token_id in ids] if body.return_token_strs else None,
        )

    return await service.work_on_text(len(text), work)


async def detokenize(service: Service, ready: Ready, body: DetokenizeRequest) -> DetokenizeAnswer:
    """Text of token ids, special tokens included."""
    service.model_name(body.model)
    if not body.tokens:
        return DetokenizeAnswer(prompt="")
    try:
        ids = array("i", body.tokens)
    except OverflowError:
        raise bad_request("tokens: a token id is outside the vocabulary", "tokens") from None
    check_ids(ids, ready.facts.shape.vocab_size, "tokens")
    text = await service.work_on_text(len(ids), lambda: ready.tokenizer.decode(ids, skip_special_tokens=False))
    return DetokenizeAnswer(prompt=text)
