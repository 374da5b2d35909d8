"""Long texts are encoded by slices: the same ids as of the whole, whatever the tokenizer's kind and the text."""

from __future__ import annotations

import random
from array import array

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_medha.text import text_slices
from megatron_medha.text.text_slices import TextWithoutBreaksError, slice_encoder
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig, TooManyTokens

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


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return KINDS[request.param]()


def test_the_slices_of_a_text_have_the_ids_of_the_whole(
    backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_slices, "SLICE_CHARS", 700)
    encode = slice_encoder(backend)
    assert encode is not None
    for seed in range(12):
        text = text_of(random.Random(seed), 900)
        slices = list(encode(text))
        assert len(slices) > 3
        assert sum(slices, []) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["a" * 5000, "7" * 5000, " " * 5000, "漢" * 5000, "<s>" * 2000, "\u0301" * 3000])
def test_a_text_without_a_place_to_cut_is_encoded_all_the_same(
    backend: tokenizers.Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_slices, "SLICE_CHARS", 700)
    encode = slice_encoder(backend)
    assert encode is not None
    assert sum(encode(text), []) == backend.encode(text, add_special_tokens=False).ids


def test_a_stretch_that_would_take_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_slices, "SLICE_CHARS", 700)
    monkeypatch.setattr(text_slices, "MAX_STRETCH_CHARS", 2_800)
    encode = slice_encoder(with_words())
    assert encode is not None
    with pytest.raises(TextWithoutBreaksError, match="2800 characters"):
        list(encode("a " * 1000 + " " * 6000 + "a"))
    for words in (pre_tokenizers.Whitespace(), pre_tokenizers.BertPreTokenizer()):
        encode = slice_encoder(words_alone(words))
        assert encode is not None
        assert sum(encode("a " * 100 + " " * 6000 + "the a"), []) == [2] * 100 + [1, 2]


@pytest.mark.parametrize("pattern", [r"(?<=a)b|\w+", r"\bfoo|\w+", r"^a|\w+", r"\Aa|\w+", r"(?<!x)y|\w+"])
def test_patterns_that_look_back_are_not_sliced(pattern: str) -> None:
    assert slice_encoder(with_words(pattern)) is None


def test_tokens_that_take_the_blanks_around_them_are_not_sliced() -> None:
    backend = with_words()
    backend.add_tokens([AddedToken("<x>", lstrip=True)])
    assert slice_encoder(backend) is None


def test_special_tokens_around_a_long_text_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = with_words()
    ids = [backend.token_to_id(token) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids[0]), ("</s>", ids[1])]
    )
    monkeypatch.setattr("megatron_medha.text.tokenizer.SLICE_CHARS", 700)
    monkeypatch.setattr(text_slices, "SLICE_CHARS", 700)
    tokenizer, text = Tokenizer(backend, TokenizerConfig()), text_of(random.Random(0), 900)
    assert tokenizer.encode(text) == array("i", backend.encode(text).ids)
    assert tokenizer.encode(text, add_special_tokens=False) == array("i", backend.encode(text).ids[1:-1])


def test_a_text_with_too_many_tokens_is_not_encoded_to_its_end() -> None:
    tokenizer = Tokenizer(with_words(), TokenizerConfig())
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode("a b c " * 100_000, max_tokens=1000)
    assert 1000 < caught.value.at_least <= 1000 + text_slices.SLICE_CHARS
