"""From what a client sent as prompt to checked token ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.server.generation import Prompt
from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.service import ReadyState, Service
from megatron_medha.text.text_slices import TextWithoutBreaksError
from megatron_medha.text.tokenizer import TooManyTokens

RawPrompt: TypeAlias = "str | list[int] | array[int]"  # array has no item types at run time


class _EncodedPrompt(NamedTuple):
    token_ids: array[int]
    keys: GranuleKeys | None
    prefix_keys: bytes


_MAX_PROMPTS = 2048  # in one call; lm-eval and OpenAI's batches stay below
_SLICE_IDS = 65_536  # looked at without letting another thread run: a millisecond


def split_prompts(prompt: str | array[int] | Sequence[str | int | list[int] | array[int]]) -> list[RawPrompt]:
    """The one or more prompts in OpenAI's `prompt` field: text, ids, or a list of either."""
    if isinstance(prompt, str | array):
        return [prompt]
    if not prompt:
        raise bad_request("prompt: expected at least one token or text, got an empty list", "prompt")
    kinds = {list if isinstance(item, array) else type(item) for item in prompt}
    if kinds == {int}:
        return [list(prompt)]  # type: ignore[arg-type]  # every item is an int
    if len(kinds) != 1:
        raise bad_request("prompt: expected texts only, token ids only or lists of token ids only", "prompt")
    if len(prompt) > _MAX_PROMPTS:
        raise bad_request(f"prompt: {len(prompt)} prompts in one call exceed the limit of {_MAX_PROMPTS}", "prompt")
    return list(prompt)  # type: ignore[arg-type]  # every item is a str, or every item a list


async def encode_prompts(
    service: Service,
    ready: ReadyState,
    prefix_root: bytes | None,
    raw_prompts: Sequence[RawPrompt],
    *,
    max_tokens: int | None,
    max_tokens_param: str = "max_tokens",
    default_max_tokens: int | None = None,
    add_special_tokens: bool,
    param: str,
    keeps_text: bool = False,
) -> tuple[Prompt, ...]:
    """Encode and check prompts against the context; without max_tokens they get the default, or what fits.

    prefix_root: of their keys; None: they get none.
    """
    limit = ready.facts.max_request_tokens
    tokenizer = ready.tokenizer
    least_output = 0 if max_tokens == 0 else 1
    for raw in raw_prompts:
        at_least = tokenizer.min_num_tokens(raw) if isinstance(raw, str) else len(raw)
        check_length(at_least, limit - least_output, ready, service, param, is_exact=not isinstance(raw, str))

    encoded_texts: dict[str, _EncodedPrompt] = {}  # a text that comes again is encoded once

    def encode(raw: RawPrompt) -> _EncodedPrompt:
        if isinstance(raw, str) and (known := encoded_texts.get(raw)) is not None:
            return known
        if isinstance(raw, str):
            ids = encode_text(ready, raw, add_special_tokens, limit - least_output, param, prefix_root)
        else:
            ids = as_ids(raw, param)
        vocab_size = ready.facts.shape.vocab_size
        if not (isinstance(raw, str) and ids and tokenizer.max_token_id < vocab_size):
            check_ids(ids, vocab_size, param)  # a millisecond for 30,000
        encoded = _with_keys(ids, prefix_root, ready.facts.granule_tokens)
        if isinstance(raw, str):
            encoded_texts[raw] = encoded
        return encoded

    num_chars = sum(map(len, raw_prompts))
    try:
        all_encoded = await service.text.run(num_chars, lambda: [encode(raw) for raw in raw_prompts])
    except TooManyTokens as error:
        check_length(error.at_least, limit - least_output, ready, service, param, is_exact=False)
        raise
    prompts = []
    for raw, encoded in zip(raw_prompts, all_encoded, strict=True):
        token_ids = encoded.token_ids
        check_length(len(token_ids), limit - least_output, ready, service, param)
        room = limit - len(token_ids)
        if max_tokens is not None and max_tokens > room:
            # Claude Code reads the numbers, and sends a smaller one.
            raise bad_request(
                f"input length and `{max_tokens_param}` exceed context limit: {len(token_ids)} + {_short(max_tokens)} "
                f"> {limit}; at most {max_tokens_param}={room} fits this prompt", max_tokens_param,
                "context_length_exceeded",
            )  # fmt: skip
        wanted = max_tokens if max_tokens is not None else min(default_max_tokens or room, room)
        prompts.append(
            Prompt(
                token_ids=token_ids,
                keys=encoded.keys,
                prefix_keys=encoded.prefix_keys,
                text=raw if keeps_text and isinstance(raw, str) else None,
                max_output_tokens=max(1, wanted),  # max_tokens 0: one is computed and thrown away
            )
        )
    return tuple(prompts)


def _with_keys(ids: array[int], prefix_root: bytes | None, granule_tokens: int | None) -> _EncodedPrompt:
    if prefix_root is None or granule_tokens is None:
        return _EncodedPrompt(ids, None, b"")
    keys = GranuleKeys(prefix_root, granule_tokens)
    return _EncodedPrompt(ids, keys, keys.extend(ids))


def encode_text(
    ready: ReadyState, text: str, adds_special: bool, max_tokens: int, param: str, prefix_root: bytes | None = None
) -> array[int]:
    """Ids of a text; TooManyTokens, or ApiError 400 for one that would take too much memory.

    prefix_root: texts of the same one are continued where they share a beginning; None: all of it is encoded.
    """
    try:
        if prefix_root is None:
            return ready.tokenizer.encode(text, add_special_tokens=adds_special, max_tokens=max_tokens)
        return ready.turns.encode(text, root=prefix_root, add_special_tokens=adds_special, max_tokens=max_tokens)
    except TextWithoutBreaksError as error:
        raise bad_request(f"{param}: {error}", param, "text_without_breaks") from None


def check_length(
    num_tokens: int, most: int, ready: ReadyState, service: Service, param: str, *, is_exact: bool = True
) -> None:
    """ApiError unless a prompt of so many tokens is within `most`, of the context, and server.max_prompt_tokens.

    is_exact: whether it has so many tokens, or at least so many.
    """
    allowed = service.config.max_prompt_tokens
    if allowed is not None and num_tokens > allowed:
        message = f"prompt is too long: at least {num_tokens} tokens > {allowed} maximum (server.max_prompt_tokens)"
        raise ApiError(413, message, param=param, code="prompt_too_long")
    if num_tokens > most:
        # Claude Code reads the first words, and sends less.
        raise bad_request(
            f"prompt is too long: {'' if is_exact else 'at least '}{num_tokens} tokens > "
            f"{ready.facts.max_request_tokens} maximum of prompt and output together; at least one output token must "
            "fit, unless max_tokens is 0", param, "context_length_exceeded",
        )  # fmt: skip


def check_ids(token_ids: array[int], vocab_size: int, param: str) -> None:
    """ApiError 400 unless there are ids and the model has an embedding for each."""
    if not token_ids:
        raise bad_request(f"{param}: the prompt is empty", param, "empty_prompt")
    for begin in range(0, len(token_ids), _SLICE_IDS):
        ids = token_ids[begin : begin + _SLICE_IDS]
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise bad_request(
                f"{param}: token id {wrong} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})", param
            )


def as_ids(raw: Sequence[int], param: str) -> array[int]:
    """As an array; ApiError 400 for numbers that are no ids of any model."""
    try:
        return raw if isinstance(raw, array) else array("i", raw)
    except OverflowError:
        wrong = max(raw, key=abs)
        raise bad_request(f"{param}: token id {_short(wrong)} is outside the vocabulary", param) from None


def _short(number: int) -> str:
    # Clients may send numbers of any length; an error message should not.
    return str(number) if abs(number) < 10**20 else f"of {number.bit_length()} bits"
