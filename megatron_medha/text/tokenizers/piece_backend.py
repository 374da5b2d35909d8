"""A SentencePiece model behind the part of the `tokenizers` library's interface that Tokenizer uses.

SentencePiece's own library encodes, so that ids are its own: how it normalises a text no other library does alike.
Everything else, as names and bytes of tokens, is asked of the same vocabulary in a tokenizer of `tokenizers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_medha.core.errors import DependencyError
from megatron_medha.text.text_slices import SLICE_CHARS, EncodeSlices
from megatron_medha.text.tokenizers.sentencepiece_file import PieceModel, parse_piece_model
from megatron_medha.text.tokenizers.tokenizer_json import SPACE_MARK

if TYPE_CHECKING:
    import tokenizers

_MAX_STEPS = 4_096
_KNOWN_NORMALIZERS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")  # none of them joins words


@dataclass(frozen=True, slots=True)
class PieceEncoding:
    """What a text is encoded to."""

    ids: list[int]

    @property
    def sequence_ids(self) -> list[int]:
        """All of them belong to the text."""
        return [0] * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class PieceBackend:
    """Methods may be called from any thread.

    Special tokens are found in a text first, as `tokenizers` does; what is between them is encoded each by itself, as
    Megatron does.
    """

    def __init__(self, content: bytes, vocabulary: tokenizers.Tokenizer) -> None:
        """content: of the model file. vocabulary: the same, with special tokens of other files."""
        try:
            import sentencepiece
        except ImportError as error:
            raise DependencyError(
                "a SentencePiece tokenizer.model needs the package sentencepiece: "
                "pip install 'megatron_medha[sentencepiece]', or pip install sentencepiece"
            ) from error
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self._vocabulary = vocabulary
        self._model = parse_piece_model(content)
        self.encode_special_tokens = False  # as in the library: whether the names of special tokens are text
        added = vocabulary.get_added_tokens_decoder()
        self._ids = {token.content: token_id for token_id, token in added.items() if token.content}
        self._special = {token.content for token in added.values() if token.special}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vocabulary, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> PieceEncoding:
        """add_special_tokens: nothing is put around a text here."""
        names = set(self._ids) - self._special if self.encode_special_tokens else set(self._ids)
        ids: list[int] = []
        for part in _split_at(names, text):
            ids += [self._ids[part]] if part in names else self._encoded(part)
        return PieceEncoding(ids)

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[PieceEncoding]:
        """Each of them."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def _encoded(self, text: str) -> list[int]:
        if not text:
            return []
        # Half a surrogate pair is no text for the library.
        found: list[int] = self._processor.encode(text.encode("utf-8", "replace").decode())
        return found

    def slice_encoder(self) -> EncodeSlices | None:
        """Encodes a long text by slices that end before a space; None where a piece may hold one in its middle.

        The library holds the interpreter lock while it encodes.
        """
        is_safe = self._model.prepends and not self._model.marks_after
        if not is_safe or self._model.normalizer not in _KNOWN_NORMALIZERS or _has_inner_spaces(self._model):
            return None
        return self._encode_slices

    def _encode_slices(self, text: str) -> Iterator[list[int]]:
        reach = max(map(len, self._ids), default=0) + 1
        begin = 0
        while begin + SLICE_CHARS < len(text):
            end = self._last_cut(text, begin, begin + SLICE_CHARS, reach)
            if end == begin:
                break
            yield self.encode(text[begin:end]).ids
            begin = end + 1  # the space, which the library puts before every text
        yield self.encode(text[begin:]).ids

    def _last_cut(self, text: str, begin: int, end: int, reach: int) -> int:
        for place in range(end, max(begin, end - _MAX_STEPS), -1):
            around = text[place - 1 : place + 2]
            if len(around) != 3 or around[1] != " " or not _is_plain(around[0]) or not _is_plain(around[2]):
                continue
            near = text[max(0, place - reach) : place + reach]
            if not any(name in near for name in self._ids):
                return place
        return begin


def _is_plain(char: str) -> bool:
    return char.isascii() and char.isalnum()


def _split_at(names: set[str], text: str) -> list[str]:
    """The text in parts, each one of the names or without any; the longest of names that begin at one place."""
    if not names:
        return [text]
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.split(f"({pattern})", text)


def _has_inner_spaces(model: PieceModel) -> bool:
    return any(SPACE_MARK in piece.text[1:].lstrip(SPACE_MARK) or " " in piece.text for piece in model.pieces)
