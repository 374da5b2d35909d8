"""Log-probabilities as clients want them: OpenAI's two styles."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.server.bodies.openai_types import CompletionLogprobs, TokenLogprob, TopLogprob
from megatron_medha.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI and vLLM write this for tokens that cannot be.
LOWEST_LOGPROB = -9999.0

TokenNamer = Callable[[int], str]


def token_namer(tokenizer: Tokenizer, *, by_id: bool) -> TokenNamer:
    """How tokens are written in logprobs: their text, or "token_id:N" where the client wants no ambiguity."""
    return _name_by_id if by_id else tokenizer.token_name


def add_completion_token(
    into: CompletionLogprobs, token_id: int, logprobs: TokenLogprobs | None, text_offset: int, name: TokenNamer
) -> None:
    """Add one position; None logprobs are those of a prompt's first token, which nothing predicts."""
    into.tokens.append(name(token_id))
    into.text_offset.append(text_offset)
    if logprobs is None:
        into.token_logprobs.append(None)
        into.top_logprobs.append(None)
        return
    # Two tokens may have the same text; then the later one goes by its id, so that no value is lost and
    # "chosen is the best" can be read off by comparing values (lm-eval does).
    chosen = max(logprobs.logprob, LOWEST_LOGPROB)
    top = {name(token_id): chosen}
    for other_id, logprob in logprobs.top:
        if other_id != token_id:
            other = name(other_id)
            top[other if other not in top else _name_by_id(other_id)] = max(logprob, LOWEST_LOGPROB)
    into.token_logprobs.append(chosen)
    into.top_logprobs.append(top)


def chat_token(
    token_id: int, logprobs: TokenLogprobs, num_top: int, tokenizer: Tokenizer, name: TokenNamer
) -> TokenLogprob:
    """One position in the style of chats."""
    return TokenLogprob(
        token=name(token_id),
        logprob=max(logprobs.logprob, LOWEST_LOGPROB),
        bytes=list(tokenizer.token_bytes(token_id)),
        top_logprobs=[
            TopLogprob(name(other), max(logprob, LOWEST_LOGPROB), list(tokenizer.token_bytes(other)))
            for other, logprob in logprobs.top[:num_top]
        ],
    )


def _name_by_id(token_id: int) -> str:
    return f"token_id:{token_id}"
