"""Turning tokens into text as they come, without ever sending half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence, Set

from megatron_medha.text.tokenizer import PieceKind, Tokenizer

# The general way re-decodes a few tokens of context, because text may depend on the tokens before it.
NUM_CONTEXT_TOKENS = 6


def make_detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool, shown: Iterable[str] = ()
) -> ByteDetokenizer | WindowDetokenizer:
    """The right detokenizer for this vocabulary; what follows continues the prompt.

    shown: special tokens that are not skipped.
    """
    skipped = tokenizer.special_ids.difference(map(tokenizer.token_id, shown)) if skip_special_tokens else frozenset()
    if tokenizer.kind is PieceKind.OTHER:
        return WindowDetokenizer(tokenizer, prompt_ids, skipped)
    return ByteDetokenizer(tokenizer, skipped)


class ByteDetokenizer:
    """For vocabularies whose entries are bytes: a UTF-8 decoder that waits for whole characters."""

    def __init__(self, tokenizer: Tokenizer, skipped: Set[int] = frozenset()) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain."""
        return "" if token_id in self._skipped else self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """A replacement character if the last character stayed incomplete."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For all other vocabularies: decodes a window of tokens again and sends what is new in it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skipped: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        self._num_old_tokens = len(self._window)  # of the window; their text has been sent
        self._old_text = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain."""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_new_tokens = len(self._window) - self._num_old_tokens
        # A character of UTF-8 has four bytes at most: after four tokens the replacement character is real.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and num_new_tokens < 4:
            return ""
        return self._accept(text)

    def finish(self) -> str:
        """What was held back."""
        return self._accept(self._decode(self._window))

    def _accept(self, text: str) -> str:
        new = text[len(self._old_text) :]
        del self._window[: max(0, len(self._window) - NUM_CONTEXT_TOKENS)]
        self._num_old_tokens = len(self._window)
        self._old_text = self._decode(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        shown = [token_id for token_id in token_ids if token_id not in self._skipped]
        return self._tokenizer.decode(shown, skip_special_tokens=False)
