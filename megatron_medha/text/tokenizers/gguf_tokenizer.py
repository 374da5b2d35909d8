"""The tokenizer in the metadata of a GGUF file, with the chat template there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import shown
from megatron_medha.safe_files.gguf_file import read_gguf
from megatron_medha.text.tokenizers.byte_pair_files import split_merges
from megatron_medha.text.tokenizers.sentencepiece_file import PieceModel, PieceType, VocabularyPiece, pieces_json
from megatron_medha.text.tokenizers.tokenizer_json import PATTERNS, ReadTokenizer, byte_level

_PREFIX = "tokenizer.ggml."
# How llama.cpp's tokenizer.ggml.pre splits a text.
_SPLITS: Mapping[str, dict[str, Any]] = {
    "gpt-2": {},
    "smollm": {"splits_digits": True},
    "llama-bpe": {"pattern": PATTERNS["llama3"], "ignores_merges": True},
    "qwen2": {"pattern": PATTERNS["qwen2"], "composes": True},
    "deepseek-r1-qwen": {"pattern": PATTERNS["qwen2"], "composes": True},
}
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_gguf_tokenizer(path: Path) -> ReadTokenizer:
    """The tokenizer in that file. Raises CheckpointError for a kind that is not read, or one that is damaged."""
    metadata = read_gguf(path).metadata
    tokens = _list(path, metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: {_PREFIX}tokens holds a token twice")
    types = _list(path, metadata, "token_type", int, len(tokens))
    try:
        kinds = [PieceType(kind) for kind in types]
    except ValueError as error:
        raise CheckpointError(f"{path}: {_PREFIX}token_type: {error}") from error
    match metadata.get(f"{_PREFIX}model"):
        case "gpt2":
            content = _byte_level(path, metadata, tokens, kinds)
        case "llama":
            content = _pieces(path, metadata, tokens, kinds)
        case other:
            raise CheckpointError(
                f"{path}: {_PREFIX}model={shown(other)} is not read, gpt2 and llama are; tokenizer=DIR names another"
            )
    settings: dict[str, Any] = {}
    for name, key in _NAMES.items():
        token_id = metadata.get(f"{_PREFIX}{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            settings[name] = tokens[token_id]
    begins = metadata.get(f"{_PREFIX}add_bos_token", metadata.get(f"{_PREFIX}model") == "llama")
    settings["add_bos_token"] = bool(begins)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return ReadTokenizer(content, settings)


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str], kinds: list[PieceType]) -> str:
    pre = metadata.get(f"{_PREFIX}pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise CheckpointError(
            f"{path}: {_PREFIX}pre={shown(pre)}: how it splits a text is not known, that of {', '.join(_SPLITS)} is; "
            "tokenizer=DIR names a directory with the model's tokenizer.json"
        )
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = split_merges(_list(path, metadata, "merges", str))
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():
            raise CheckpointError(f"{path}: {_PREFIX}merges: {shown(left)} and {shown(right)} make no token")
    special = {token: vocab[token] for token, kind in zip(tokens, kinds, strict=True) if kind is PieceType.CONTROL}
    plain = [token for token, kind in zip(tokens, kinds, strict=True) if kind is PieceType.USER_DEFINED]
    return byte_level(vocab, merges, special, plain_added=plain, **_SPLITS[pre])


def _pieces(path: Path, metadata: Mapping[str, Any], tokens: list[str], kinds: list[PieceType]) -> str:
    scores = _list(path, metadata, "scores", float, len(tokens))
    unk = metadata.get(f"{_PREFIX}unknown_token_id", 0)
    return pieces_json(
        PieceModel(
            pieces=tuple(map(VocabularyPiece, tokens, scores, kinds)),
            is_bpe=True,
            has_byte_fallback=PieceType.BYTE in kinds,
            prepends=metadata.get(f"{_PREFIX}add_space_prefix", True) is not False,
            normalizer="identity",
            marks_after=False,
            unk_id=unk if isinstance(unk, int) else 0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
        )
    )


def _list(path: Path, metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    found = metadata.get(f"{_PREFIX}{key}")
    if not isinstance(found, list) or not found or not all(isinstance(each, kind) for each in found):
        raise CheckpointError(f"{path}: {_PREFIX}{key} is missing, or holds something else than {kind.__name__}")
    if length is not None and len(found) != length:
        raise CheckpointError(f"{path}: {_PREFIX}{key} has {len(found)} items for {length} tokens")
    return found
