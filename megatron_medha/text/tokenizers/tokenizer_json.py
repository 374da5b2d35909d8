"""Writing other kinds of tokenizers as the contents of a tokenizer.json: vocabulary, merges, how a text is split.

Every reader of tokenizers here (encoding, slices, borders, guided output) then has one kind to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from megatron_medha.text.text_slices import CHAR_OF_BYTE

SPACE_MARK = "▁"

# How a text is split into words before it is encoded, by the names that files and llama.cpp use.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # Megatron's two.
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class ReadTokenizer(NamedTuple):
    """A tokenizer as read from files of whatever kind."""

    content: str              # of a tokenizer.json
    settings: dict[str, Any]  # as in tokenizer_config.json: the names of special tokens, the chat template
    pieces: bytes | None = None  # the SentencePiece model that encodes; None: the contents do


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    special: Mapping[str, int],
    *,
    pattern: str | None = None,
    splits_digits: bool = False,
    ignores_merges: bool = False,
    composes: bool = False,
    plain_added: Iterable[str] = (),
) -> str:
    """A vocabulary of bytes in GPT-2's alphabet, and what is merged, in this order.

    pattern: None is GPT-2's. splits_digits: each is a word of its own. ignores_merges: a word that is an entry is
    taken whole. composes: NFC first. plain_added: found in any text as special tokens are, and are text all the same.
    """
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if splits_digits else []
    if pattern is not None:
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    steps.append(_byte_level(use_regex=pattern is None))
    return _content(
        {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignores_merges,
            "vocab": {**vocab, **special}, "merges": merges,
        },
        special,
        plain={token: vocab[token] for token in plain_added},
        normalizer={"type": "NFC"} if composes else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        decoder=_byte_level(use_regex=True),
    )  # fmt: skip


def merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of entries that make an entry, in the order of what they make. ranks: the lowest is merged first."""
    found = []
    for token, rank in ranks.items():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def in_alphabet(token: bytes) -> str:
    """Bytes in GPT-2's alphabet."""
    return "".join(CHAR_OF_BYTE[byte] for byte in token)


def with_marked_spaces(model: Mapping[str, Any], special: Mapping[str, int], *, prepends: bool) -> str:
    """A vocabulary of SentencePiece, whose spaces are ▁. prepends: a text begins with one."""
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]  # fmt: skip
    if prepends:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _content(
        model,
        special,
        normalizer={"type": "Sequence", "normalizers": [prepend, replace]} if prepends else replace,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": steps},
    )


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _content(
    model: Mapping[str, Any], special: Mapping[str, int], plain: Mapping[str, int] | None = None, **sections: Any
) -> str:
    added = [
        {"id": token_id, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": token in special}
        for token, token_id in sorted({**special, **(plain or {})}.items(), key=lambda item: item[1])
    ]  # fmt: skip
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None,
        **sections, "model": model,
    }  # fmt: skip
    return msgspec.json.encode(whole).decode()
