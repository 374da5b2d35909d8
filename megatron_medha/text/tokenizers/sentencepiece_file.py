"""A SentencePiece model file (tokenizer.model) as data: its pieces, and what it does to a text first.

The file is a protocol buffer; the few fields that count are read here, so that ranks need no further package.
Source: sentencepiece_model.proto, https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import MAX_TOKENIZER_BYTES, read_bytes, shown
from megatron_medha.text.tokenizers.tokenizer_json import ReadTokenizer, merges_of, with_marked_spaces

_BPE = 2
# Of transformers' classes those that give SentencePiece's own ids; others shift them or add to them.
_CLASSES = ("", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer")
_BEGINNING = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")  # these put <s> before a text


class PieceType(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class VocabularyPiece:
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceModel:
    """What the file says."""

    pieces: tuple[VocabularyPiece, ...]
    is_bpe: bool
    has_byte_fallback: bool
    prepends: bool          # a space before every text
    normalizer: str         # its name; "identity", "nmt_nfkc"...
    marks_after: bool       # the space belongs to the word before it
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


def read_sentencepiece(path: Path, settings: Mapping[str, Any]) -> ReadTokenizer:
    """The tokenizer in that file. Raises CheckpointError naming the file."""
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{path}: tokenizer_class={shown(kind)} changes the ids of its SentencePiece model, or adds to them; "
            "save_pretrained of a Hugging Face fast tokenizer writes a tokenizer.json, which says how"
        )
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    try:
        model = parse_piece_model(content)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: is no SentencePiece model, or a damaged one: {error}") from error
    names = {}
    for key, token_id in (("bos", model.bos_id), ("eos", model.eos_id), ("unk", model.unk_id), ("pad", model.pad_id)):
        if 0 <= token_id < len(model.pieces):
            names[f"{key}_token"] = model.pieces[token_id].text
    begins: dict[str, Any] = {"add_bos_token": True} if kind in _BEGINNING else {}
    stated = {key: value for key, value in settings.items() if value is not None}
    return ReadTokenizer(pieces_json(model), {**begins, **names, **stated}, content)


def pieces_json(model: PieceModel) -> str:
    """The vocabulary as a tokenizer.json. Raises ValueError if a piece is there twice.

    It encodes as the SentencePiece library does where the text is not normalised first, with BPE; with others about so.
    """
    ids = {piece.text: place for place, piece in enumerate(model.pieces)}
    special = {
        piece.text: place for place, piece in enumerate(model.pieces)
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
    }  # fmt: skip
    unk = model.pieces[model.unk_id].text if 0 <= model.unk_id < len(model.pieces) else None
    if model.is_bpe:
        ranks = {piece.text: -piece.score for piece in model.pieces if piece.type is PieceType.NORMAL}
        merged: Mapping[str, Any] = {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": model.has_byte_fallback,
            "ignore_merges": False, "vocab": ids, "merges": merges_of(ranks),
        }  # fmt: skip
    else:
        merged = {
            "type": "Unigram", "unk_id": model.unk_id, "byte_fallback": model.has_byte_fallback,
            "vocab": [(piece.text, piece.score) for piece in model.pieces],
        }  # fmt: skip
    return with_marked_spaces(merged, special, prepends=model.prepends)


def parse_piece_model(content: bytes) -> PieceModel:
    """The model. Raises ValueError, IndexError or struct.error if it is damaged or none."""
    pieces: list[VocabularyPiece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(content):
        match field:
            case 1:
                pieces.append(_piece(value))
            case 2:
                trainer = dict(_fields(value))
            case 3:
                normalizer = dict(_fields(value))
    if not pieces or not trainer or not normalizer:
        raise ValueError("it has no pieces, or ends before what follows them; it is cut off")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ValueError("a piece is there twice")
    ids = {name: _signed(trainer.get(field, default)) for name, (field, default) in _ID_FIELDS.items()}
    return PieceModel(
        pieces=tuple(pieces),
        is_bpe=trainer.get(3, 1) == _BPE,
        has_byte_fallback=bool(trainer.get(35, 0)),
        prepends=bool(normalizer.get(3, 1)),
        normalizer=bytes(normalizer.get(1, b"")).decode() or "identity",
        marks_after=bool(trainer.get(24, 0)),
        **ids,
    )


_ID_FIELDS = {"unk_id": (40, 0), "bos_id": (41, 1), "eos_id": (42, 2), "pad_id": (43, -1)}  # number, default


def _piece(content: bytes) -> VocabularyPiece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return VocabularyPiece(bytes(fields.get(1, b"")).decode(), score, PieceType(fields.get(3, 1)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each: an int for numbers, bytes for the others."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield field, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(content, at)
        if size is None or at + size > len(content):
            raise ValueError(f"a field of kind {kind} at byte {at} does not belong there")
        yield field, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number at byte {at} has no end")
