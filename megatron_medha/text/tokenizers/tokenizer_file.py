"""Reading tokenizer.json, and refusing what would make the `tokenizers` library take all memory or end the process.

The library aborts where it cannot get the memory that a file asks for: for a normalizer's table, or for a text of which
every letter becomes a gigabyte.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import MAX_TOKENIZER_BYTES, cut, read_bytes, shown

_MAX_SECTION_BYTES = 8 << 20  # a table of normalisations has half of one
_MAX_REGEX_CHARS = 32768      # the longest known have 3,000
_MAX_TEXT_CHARS = 256         # what is inserted or replaced; the longest known have 20
_MAX_SPECIAL_IDS = 256        # that a post-processor puts around a text


class TokenizerPanicError(Exception):
    """The library has given up on a file or a text."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Panics of the Rust library are no Exceptions, and would pass by whatever ends a request in good order."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerPanicError(f"the tokenizer library has given up: {error}") from None


class _Sections(msgspec.Struct):
    """What is looked at; the vocabulary is the library's business."""

    normalizer: msgspec.Raw = msgspec.Raw(b"null")
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"null")
    post_processor: msgspec.Raw = msgspec.Raw(b"null")
    decoder: msgspec.Raw = msgspec.Raw(b"null")


def read_tokenizer_file(path: Path) -> str:
    """The contents of tokenizer.json, safe to give to the library. Raises CheckpointError naming the file."""
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    try:
        sections = msgspec.json.decode(content, type=_Sections)
        for name in sections.__struct_fields__:
            raw = getattr(sections, name)
            if len(raw) > _MAX_SECTION_BYTES:
                raise CheckpointError(f"{path}: {name} takes {len(raw)} bytes, more than {_MAX_SECTION_BYTES}")
            for part in _objects(msgspec.json.decode(raw)):
                if (why := _objection(part)) is not None:
                    raise CheckpointError(f"{path}: {name}: {why}")
        return content.decode()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid tokenizer: {cut(error)}") from error


class _VocabularyTable(msgspec.Struct):
    """By model, tokens and their ids, or pairs of token and score in the order of ids."""

    vocab: dict[str, int] | list[tuple[str, float]] = msgspec.field(default_factory=dict)


class _AddedToken(msgspec.Struct):
    content: str
    id: int


class _Tokens(msgspec.Struct):
    model: _VocabularyTable
    added_tokens: list[_AddedToken] = []


def token_ids(content: str, path: Path) -> dict[str, int]:
    """The ids of all tokens in the contents of a tokenizer.json. Raises CheckpointError naming the file."""
    try:
        found = msgspec.json.decode(content, type=_Tokens)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid tokenizer: {cut(error)}") from error
    vocab = found.model.vocab
    ids = vocab if isinstance(vocab, dict) else {token: place for place, (token, _) in enumerate(vocab)}
    return ids | {token.content: token.id for token in found.added_tokens}


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _objection(part: dict[str, Any]) -> str | None:
    """What is wrong with one step of the pipeline; None when nothing is."""
    for key, text in part.items():
        max_chars = {"precompiled_charsmap": _MAX_SECTION_BYTES, "Regex": _MAX_REGEX_CHARS}.get(key, _MAX_TEXT_CHARS)
        if isinstance(text, str) and len(text) > max_chars:
            return f"{key} has {len(text)} characters, more than {max_chars}"
    table = part.get("precompiled_charsmap")
    if isinstance(table, str) and not _is_table(table):
        return "precompiled_charsmap is damaged"
    if "pattern" in part and part["pattern"] in ({"String": ""}, {"Regex": ""}):
        return f"pattern={shown(part['pattern'])} matches between all letters"
    if part.get("type") == "TemplateProcessing":
        num_ids = _num_special_ids(part)
        if num_ids > _MAX_SPECIAL_IDS:
            return f"it puts {num_ids} special tokens around a text, more than {_MAX_SPECIAL_IDS}"
    return None


def _is_table(encoded: str) -> bool:
    """Whether a table of normalisations is as long as its first number says that its index is."""
    try:
        table = base64.b64decode(encoded)
    except ValueError:
        return False
    return len(table) >= 4 and int.from_bytes(table[:4], "little") <= len(table) - 4


def _num_special_ids(part: dict[str, Any]) -> int:
    ids_of = {name: len(token["ids"]) for name, token in part.get("special_tokens", {}).items()}
    steps = [*part.get("single", []), *part.get("pair", [])]
    return sum(ids_of.get(step["SpecialToken"]["id"], 1) for step in steps if "SpecialToken" in step)
