"""Long texts are encoded by slices: the same ids as of the whole, whatever the tokenizer's kind and the text."""

from __future__ import annotations

import random
from array import array

import pytest
import tokenizers
from tokenizer_kinds import KINDS, text_of, with_words, words_alone
from tokenizers import AddedToken, pre_tokenizers, processors

from megatron_medha.text import text_slices
from megatron_medha.text.text_slices import TextWithoutBreaksError, slice_encoder
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig, TooManyTokens


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
