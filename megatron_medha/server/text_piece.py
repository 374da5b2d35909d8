"""A piece of a completion: text, its tokens and their log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

from megatron_medha.core.sampling import TokenLogprobs


class Piece(NamedTuple):
    """What one token adds to a choice. Its text may be empty, or that of several tokens."""

    choice_index: int
    text: str
    token_id: int | None  # None: the token was asked for only to have its prompt computed
    logprobs: TokenLogprobs | None
    text_offset: int      # characters of output decoded before this token
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    is_first: bool
