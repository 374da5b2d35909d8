"""Tokenizers of every kind that checkpoints have, trained on little text."""

from __future__ import annotations

import random

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*(?!\d))|" + GPT4
PIECES = (
    "the ", "a ", "  ", "\n", "\r\n", "\t", "x1y", "don't ", "it's", "12345678", "3.14", "...", "!?", "()[]", "héllo ",
    "e\u0301", "漢字", "かな", "한국", "\u1100\u1161\u11a8", "🙂", "👩‍💻", "<s>", "</s>", "<|tool|>", " <s> ", "_", "▁",
    "ab" * 40, " " * 70, "7" * 90, "\u00a0", "i\u0307",
)  # fmt: skip


def text_of(rng: random.Random, num_pieces: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(num_pieces))


def trained(words: object, **options: object) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = words
    is_byte_level = not options
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
    specials = [] if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )  # fmt: skip
    texts = [text_of(random.Random(seed), 300) for seed in range(8)]
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<|tool|>", normalized=False)])
    return backend


def with_words(*patterns: str, normalizer: object = None) -> tokenizers.Tokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    backend = trained(pre_tokenizers.Sequence([*steps, byte_level]))
    backend.normalizer = normalizer
    return backend


def without_words(normalizer: object, words: object = None) -> tokenizers.Tokenizer:
    """Trained on words, as SentencePiece does, and used without: merges could cross from one to the next."""
    backend = trained(pre_tokenizers.Metaspace(), unk_token="<0x00>", fuse_unk=True, byte_fallback=True)
    backend.normalizer, backend.pre_tokenizer = normalizer, words
    return backend


def words_alone(words: object) -> tokenizers.Tokenizer:
    vocabulary = {piece: place for place, piece in enumerate(("[UNK]", "the", "a", "x1y", "don", "3", "...", "漢字"))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = words
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def bytes_without_words() -> tokenizers.Tokenizer:
    backend = with_words()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


SPACES = normalizers.Replace(" ", "▁")
KINDS = {
    "gpt2": lambda: with_words(),
    "gpt4": lambda: with_words(GPT4),
    "qwen": lambda: with_words(GPT4, normalizer=normalizers.NFC()),
    "deepseek": lambda: with_words(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", GPT4),
    "digits from the right": lambda: with_words(FROM_THE_RIGHT),
    "words alone": lambda: words_alone(pre_tokenizers.Whitespace()),
    "words of bert": lambda: words_alone(pre_tokenizers.BertPreTokenizer()),
    "no words": bytes_without_words,
    "llama2": lambda: without_words(normalizers.Sequence([normalizers.Prepend("▁"), SPACES])),
    "gemma": lambda: without_words(SPACES, pre_tokenizers.Split(" ", "merged_with_previous")),
    "metaspace": lambda: without_words(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}
