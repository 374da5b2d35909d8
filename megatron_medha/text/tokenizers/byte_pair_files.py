"""Byte-level vocabularies in files of their own: GPT-2's vocab.json and merges.txt, tiktoken's, and Megatron's JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import MAX_TOKENIZER_BYTES, cut, read_bytes, shown
from megatron_medha.text.tokenizers.tokenizer_json import PATTERNS, ReadTokenizer, byte_level, in_alphabet, merges_of

PATTERN_KEY = "tiktoken_pattern"  # in tokenizer_config.json, and of Megatron's arguments
_END_OF_TEXT = "<|endoftext|>"
_GPT2_CLASSES = ("", "GPT2Tokenizer", "PreTrainedTokenizer")
_QWEN2_CLASS = "Qwen2Tokenizer"
# OpenAI's vocabularies, and others of their format, by the number of their entries: pattern, special tokens.
_KNOWN_RANKS: Mapping[int, tuple[str, Mapping[str, int]]] = {
    50256: ("gpt2", {_END_OF_TEXT: 50256}),
    100256: (
        "cl100k",
        {_END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
    ),
    199998: ("o200k", {_END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    151643: ("qwen2", {_END_OF_TEXT: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    128000: (
        "llama3",
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006,
         "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009, "<|python_tag|>": 128010},
    ),
}  # fmt: skip
_BEGIN_NAMES = ("<|begin_of_text|>",)
_END_NAMES = (_END_OF_TEXT, "<|end_of_text|>")
# Megatron's: the first ids are special tokens, by default a thousand.
_MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_NUM_SPECIAL = 1000
_MEGATRON_VOCAB_SIZE = 1 << 17
_MAX_SPECIAL = 100_000


class _TiktokenEntry(msgspec.Struct):
    rank: int
    token_bytes: str


def read_gpt2_files(vocab_path: Path, merges_path: Path, settings: Mapping[str, Any]) -> ReadTokenizer:
    """GPT-2's kind, or Qwen 2's where tokenizer_config.json names its class. Raises CheckpointError naming the file."""
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in (*_GPT2_CLASSES, _QWEN2_CLASS):
        raise CheckpointError(
            f"{vocab_path}: tokenizer_class={shown(kind)} splits its text in a way that vocab.json and merges.txt do "
            "not say; save_pretrained of a Hugging Face fast tokenizer writes a tokenizer.json, which does"
        )
    try:
        vocab = msgspec.json.decode(read_bytes(vocab_path, MAX_TOKENIZER_BYTES), type=dict[str, int])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{vocab_path}: is no vocabulary of tokens and ids: {cut(error)}") from error
    merges = _merges(merges_path)
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise CheckpointError(
                    f"{merges_path}: merges {shown(left)} and {shown(right)}, but {vocab_path.name} has no "
                    f"{shown(token)}: the two files belong to different tokenizers, or are not byte-level"
                )
    special = {_END_OF_TEXT: vocab[_END_OF_TEXT]} if _END_OF_TEXT in vocab else {}
    is_qwen = kind == _QWEN2_CLASS
    content = byte_level(
        vocab, merges, special, pattern=PATTERNS["qwen2"] if is_qwen else None, composes=is_qwen
    )  # fmt: skip
    names = {"eos_token": _END_OF_TEXT} if special else {}
    return ReadTokenizer(content, {**names, **settings})


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = read_bytes(path, MAX_TOKENIZER_BYTES).decode("utf-8", "replace").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"{path}: line {number} is {shown(line)}, not two tokens with a space between")
        merges.append((left, right))
    return merges


def read_tiktoken_file(path: Path, settings: Mapping[str, Any]) -> ReadTokenizer:
    """A file of tiktoken's: a token in base64 and its rank on every line.

    Raises CheckpointError naming the file, also where it does not follow how a text is split.
    """
    ranks = {}
    for number, line in enumerate(read_bytes(path, MAX_TOKENIZER_BYTES).splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path}: line {number} is {shown(line)}, not a token in base64 and its rank"
            ) from None
    pattern, special = _KNOWN_RANKS.get(len(ranks), (None, {}))
    if settings.get(PATTERN_KEY) is not None or pattern is None:
        pattern = _stated_pattern(path, settings, f"{len(ranks)} tokens")
    begin = next((name for name in _BEGIN_NAMES if name in special), None)
    end = next((name for name in _END_NAMES if name in special), None)
    names: dict[str, Any] = {key: name for key, name in (("bos_token", begin), ("eos_token", end)) if name is not None}
    if begin is not None:
        names["add_bos_token"] = True
    return ReadTokenizer(_of_ranks(path, ranks, special, PATTERNS.get(pattern, pattern)), {**names, **settings})


def read_megatron_tiktoken(path: Path, settings: Mapping[str, Any]) -> ReadTokenizer:
    """Megatron's TikTokenizer: a JSON list of tokens, behind as many special ones as its arguments say."""
    try:
        entries = msgspec.json.decode(read_bytes(path, MAX_TOKENIZER_BYTES), type=list[_TiktokenEntry])
        tokens = [base64.b64decode(entry.token_bytes, validate=True) for entry in entries]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no list of tokens of Megatron's TikTokenizer: {cut(error)}") from error
    counts = all(entry.rank == place for place, entry in enumerate(entries))
    if not counts or tokens[:256] != [bytes([byte]) for byte in range(256)]:
        raise CheckpointError(f"{path}: its ranks must count from 0, beginning with the 256 bytes")
    named = list(settings.get("tiktoken_special_tokens") or _MEGATRON_SPECIAL)
    num_special = settings.get("tiktoken_num_special_tokens") or _MEGATRON_NUM_SPECIAL
    if not isinstance(num_special, int) or not len(named) <= num_special <= _MAX_SPECIAL:
        raise CheckpointError(
            f"{path}: tiktoken_num_special_tokens={shown(num_special)} must be a number from {len(named)}, the special "
            f"tokens with a name, to {_MAX_SPECIAL}"
        )
    vocab_size = settings.get("vocab_size") or _MEGATRON_VOCAB_SIZE
    if isinstance(vocab_size, int) and vocab_size > num_special:
        tokens = tokens[: vocab_size - num_special]
    named += [f"<SPECIAL_{place}>" for place in range(len(named), num_special)]
    special = {str(token): place for place, token in enumerate(named)}
    ranks = {token: num_special + place for place, token in enumerate(tokens)}
    pattern = _stated_pattern(path, {PATTERN_KEY: "v2", **{k: v for k, v in settings.items() if v is not None}}, "")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {key: name for key, name in names.items() if name in special}
    return ReadTokenizer(_of_ranks(path, ranks, special, PATTERNS[pattern]), {**names, **settings})


def _stated_pattern(path: Path, settings: Mapping[str, Any], what: str) -> str:
    stated = settings.get(PATTERN_KEY)
    if not isinstance(stated, str) or not stated:
        raise CheckpointError(
            f"{path}: {what}: how these split a text is not known. Write it into tokenizer_config.json beside it: "
            f'{{"{PATTERN_KEY}": "NAME"}}, a regular expression or one of {", ".join(PATTERNS)}'
        )
    return stated


def _of_ranks(path: Path, ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str) -> str:
    vocab = {in_alphabet(token): rank for token, rank in ranks.items()}
    missing = [byte for byte in range(256) if in_alphabet(bytes([byte])) not in vocab]
    if missing:
        raise CheckpointError(f"{path}: has no token for the byte {missing[0]}, nor for {len(missing) - 1} others")
    if twice := set(special) & set(vocab):
        raise CheckpointError(f"{path}: {shown(min(twice))} is a token and a special token")
    if taken := set(special.values()) & set(vocab.values()):
        raise CheckpointError(f"{path}: the id {min(taken)} is of a token and of a special token")
    return byte_level(vocab, merges_of(vocab), special, pattern=pattern, ignores_merges=True)


def split_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that are written with a space between."""
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
