"""Encoding a long text by slices, with the ids that the whole text has: the library takes 300 bytes a character.

A slice ends where nothing that comes before can change what comes after. Where the tokenizer splits text into words
by a pattern, that is the start of a word; where it merges over the whole text, between two characters that no entry of
the vocabulary holds side by side. Tokenizers of which neither is known to hold are not sliced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

if TYPE_CHECKING:
    import tokenizers

SLICE_CHARS = 32_768
MAX_STRETCH_CHARS = 262_144  # of one word: 60 MiB of memory
_MARGIN_CHARS = 64   # before the end of a slice, where patterns that look ahead might see its end
_MAX_STEPS = 4_096   # back from there, for a place to cut


class TextWithoutBreaksError(Exception):
    """A text cannot be encoded by slices that are small enough; the message says why."""


EncodeSlices: TypeAlias = "Callable[[str], Iterator[list[int]]]"

# These split at white space and punctuation, character by character.
_SPLITTERS = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
# What looks behind, or at where the text begins: with these, a word depends on what comes before it.
_LOOKS_BACK = re.compile(r"\(\?<|\\[bBAGK]|(?<!\[)\^")


def slice_encoder(backend: tokenizers.Tokenizer) -> EncodeSlices | None:
    """Encodes a text slice by slice, without special tokens; None where the ids might differ from the whole text's."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    names = tuple(token.content for token in added)
    normalizer, words = _state(backend.normalizer), _steps(_state(backend.pre_tokenizer), "pretokenizers")
    kinds = {step["type"] for step in words}
    is_nfc = normalizer == {"type": "NFC"}
    known = kinds <= {*_SPLITTERS, "ByteLevel", "Split", "Digits"}
    if (normalizer is None or is_nfc) and known and any(map(_finds_words, words)):
        if not all(map(_looks_ahead_only, words)):
            return None
        margin = max(map(len, names), default=0) + _MARGIN_CHARS
        return partial(_by_words, backend, is_nfc, kinds <= {*_SPLITTERS}, margin)
    if type(backend.model).__name__ == "BPE" and not is_nfc:
        return _pair_encoder(backend, normalizer, words, names)
    return None


def _by_words(
    backend: tokenizers.Tokenizer, is_nfc: bool, drops_blanks: bool, margin: int, text: str
) -> Iterator[list[int]]:
    begin, size = 0, SLICE_CHARS
    while begin + size < len(text):
        piece = text[begin : begin + size]
        encoding = backend.encode_batch([piece], add_special_tokens=False)[0]
        if not len(encoding):
            begin += size  # white space alone, of which nothing is kept
            continue
        last_word = encoding.token_to_chars(len(encoding) - 1)
        words_end = last_word[1] if drops_blanks and last_word is not None else size
        if words_end <= size - margin:
            yield encoding.ids
            begin += size - margin
            continue
        num_tokens, num_chars = _last_word(encoding, piece, is_nfc, margin)
        if num_chars == 0:
            size = _larger(size)  # one word and no end of it
            continue
        yield encoding.ids[:num_tokens]
        begin, size = begin + num_chars, SLICE_CHARS
    yield backend.encode_batch_fast([text[begin:]], add_special_tokens=False)[0].ids


def _larger(size: int) -> int:
    if size >= MAX_STRETCH_CHARS:
        raise TextWithoutBreaksError(
            f"a stretch of {size} characters has no break, and the tokenizer would take too much memory for it; send "
            f"token ids"
        )
    return 2 * size


def _last_word(encoding: Any, piece: str, is_nfc: bool, margin: int) -> tuple[int, int]:
    """How many tokens and characters come before the last word that a cut may come before; (0, 0) if none."""
    num_words = encoding.word_ids[-1] or 0 if len(encoding) else 0
    for word in range(num_words, max(0, num_words - _MAX_STEPS), -1):
        first = encoding.word_to_tokens(word)
        if first is not None:
            start = encoding.token_to_chars(first[0])[0]
            before, after = piece[start - 1], piece[start]
            # Patterns group digits from the right, by looking to where they end; NFC never changes ASCII.
            is_safe = not (before.isnumeric() and after.isnumeric()) and (after.isascii() or not is_nfc)
            if 0 < start <= len(piece) - margin and is_safe:
                return first[0], start
    return 0, 0


def _pair_encoder(
    backend: tokenizers.Tokenizer, normalizer: Any, words: list[Any], names: tuple[str, ...]
) -> EncodeSlices | None:
    """For BPE without words: Llama 2, Mistral, Gemma; and bytes alone."""
    model = backend.model
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if model.unk_token is not None and model.fuse_unk and not model.byte_fallback:
        return None
    to_metaspace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, to_metaspace]}
    if not (normalizer in (None, to_metaspace) or prepends):
        return None
    kinds = [step["type"] for step in words]
    is_byte_level = kinds == ["ByteLevel"] and not words[0]["add_prefix_space"]
    is_metaspace = kinds == ["Metaspace"] and words[0]["replacement"] == "▁"
    # Gemma's: spaces are gone by then, so it splits nothing.
    is_idle = kinds == ["Split"] and words[0]["pattern"] == {"String": " "} and normalizer is not None
    if not (is_byte_level or is_metaspace or is_idle or not kinds):
        return None
    return _ByPairs(backend, names, is_byte_level, prepends, only_at_spaces=is_metaspace or prepends)


@dataclass
class _ByPairs:
    """Cuts between characters that no entry of the vocabulary holds side by side."""

    backend: tokenizers.Tokenizer
    names: tuple[str, ...]
    is_byte_level: bool
    prepends: bool  # a space before the text: a slice that begins at a space leaves its own out
    only_at_spaces: bool
    vocab: set[str] | None = None  # made when the first long text comes
    pairs: set[str] = field(default_factory=set)

    def __call__(self, text: str) -> Iterator[list[int]]:
        if self.vocab is None:
            vocab = set(self.backend.get_vocab(with_added_tokens=False))
            self.pairs = {piece[place : place + 2] for piece in vocab for place in range(len(piece) - 1)}
            self.vocab = {piece for piece in vocab if len(piece) == 1}
        begin, size = 0, SLICE_CHARS
        while begin + size < len(text):
            end = self._last_cut(text, begin, begin + size)
            if end == begin:
                size = _larger(size)
                continue
            yield self._encode(text[begin:end])
            begin, size = end + self.prepends, SLICE_CHARS
        yield self._encode(text[begin:])

    def _encode(self, piece: str) -> list[int]:
        ids: list[int] = self.backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        return ids

    def _last_cut(self, text: str, begin: int, end: int) -> int:
        assert self.vocab is not None
        reach = max(map(len, self.names), default=0) + 1
        for place in range(end, max(begin, end - _MAX_STEPS), -1):
            if self.only_at_spaces and text[place] != " ":
                continue
            left, right = self._unit(text[place - 1], -1), self._unit(text[place], 0)
            if left + right in self.pairs or left not in self.vocab or right not in self.vocab:
                continue
            around = text[max(0, place - reach) : place + reach]
            if not any(name in around for name in self.names):
                return place
        return begin

    def _unit(self, char: str, place: int) -> str:
        """How the vocabulary writes the first or last byte of a character, or the character."""
        if self.is_byte_level:
            return CHAR_OF_BYTE[char.encode(errors="replace")[place]]
        return "▁" if char == " " else char


def _byte_level_alphabet() -> list[str]:
    # GPT-2's: printable Latin-1 stands for itself, every other byte for a letter from 256 on, in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


CHAR_OF_BYTE = _byte_level_alphabet()


def _state(part: Any) -> Any:
    return None if part is None else msgspec.json.decode(part.__getstate__())


def _steps(state: Any, key: str) -> list[Any]:
    if state is None:
        return []
    steps: list[Any] = state[key] if state["type"] == "Sequence" else [state]
    return steps


def _finds_words(step: Any) -> bool:
    return bool(step["type"] in (*_SPLITTERS, "Split") or (step["type"] == "ByteLevel" and step["use_regex"]))


def _looks_ahead_only(step: Any) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] != "Split":
        return True
    pattern = step["pattern"].get("Regex")
    # A fixed text could be cut in two, and what is merged depends on its neighbours.
    return pattern is not None and step["behavior"] in ("Isolated", "Removed") and not _LOOKS_BACK.search(pattern)
