"""The turns of conversations get the ids of their whole texts, and cost what is new in them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest
import tokenizers
from tokenizer_kinds import GPT4, KINDS, PIECES, with_words, without_words
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from megatron_medha.text.chat.chat_template import ChatTemplate
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig, TooManyTokens
from megatron_medha.text.turn_encoder import TurnEncoder

ROOT = b"root"


def with_tokens(backend: tokenizers.Tokenizer, *tokens: AddedToken) -> tokenizers.Tokenizer:
    backend.add_tokens(list(tokens))
    return backend


def begun_by_bos() -> tokenizers.Tokenizer:
    backend = with_words(GPT4)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return backend


def lower_cased() -> tokenizers.Tokenizer:
    """Its model knows the texts of added tokens, and its normalizer makes them of other texts."""
    vocabulary = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((piece, -2.0) for piece in "<s>/abthe x1y▁")]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, 0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.add_special_tokens(["<s>", "</s>"])
    return with_tokens(backend, AddedToken("<|tool|>", normalized=False))


MORE_KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bos and eos": begun_by_bos,
    "lower case": lower_cased,
    "overlapping": lambda: with_tokens(
        with_words(), AddedToken("<s><", normalized=False), AddedToken("|>", normalized=False),
        AddedToken("</s>a", normalized=False), AddedToken("the </", normalized=False),
    ),
    "stripping": lambda: with_tokens(
        with_words(), AddedToken("<|l|>", lstrip=True, normalized=False),
        AddedToken("<|r|>", rstrip=True, normalized=False), AddedToken("<|w|>", single_word=True, normalized=False),
    ),
    "normalized": lambda: with_tokens(
        with_words(normalizer=normalizers.NFC()), AddedToken("h\u00e9llo", normalized=True), AddedToken("<|n|>")
    ),
    "prefix space": lambda: without_words(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
}  # fmt: skip
ALL_KINDS = {**KINDS, **MORE_KINDS}
MORE_PIECES = (
    *PIECES, "<|l|>", "<|r|>", "<|w|>", "<|n|>", "\uff1cs\uff1e", "<S>", " <|l|> ", "<s><", "</s>a", "<", "|>",
)  # fmt: skip


@pytest.fixture(scope="module", params=ALL_KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(ALL_KINDS[request.param](), TokenizerConfig(bos_token="<s>"))


def drawn(rng: random.Random, num_pieces: int) -> str:
    return "".join(rng.choice(MORE_PIECES) for _ in range(num_pieces))


def next_text(rng: random.Random, texts: list[str]) -> str:
    """A new conversation, or another that was changed at its end or somewhere."""
    if not texts or rng.random() < 0.1:
        return drawn(rng, 500)
    text = rng.choice(texts[-4:])
    cut = rng.choice((len(text), len(text), rng.randrange(len(text)), max(0, len(text) - rng.randrange(20))))
    return text[:cut] + drawn(rng, rng.randrange(120)) + rng.choice(("", "", text[cut + 5 :]))


@pytest.mark.parametrize("max_kept_chars", [0, 20_000, 1 << 30])
def test_every_turn_has_the_ids_of_its_whole_text(tokenizer: Tokenizer, max_kept_chars: int) -> None:
    for seed in range(3):
        rng, encoder, texts = random.Random(seed), TurnEncoder(tokenizer, max_kept_chars), []
        for _ in range(60):
            texts.append(next_text(rng, texts)[:30_000])
            adds = rng.random() < 0.5
            ids = encoder.encode(texts[-1], root=ROOT, add_special_tokens=adds)
            assert ids == tokenizer.encode(texts[-1], add_special_tokens=adds)


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_special_tokens_around_a_turn_are_those_around_its_whole_text(add_bos_token: bool | None) -> None:
    for backend in (begun_by_bos(), KINDS["gpt4"]()):
        tokenizer = Tokenizer(backend, TokenizerConfig(bos_token="<s>", add_bos_token=add_bos_token))
        encoder, text = TurnEncoder(tokenizer), "<s>" + "hello there " * 100
        for _ in range(4):
            assert encoder.encode(text, root=ROOT) == tokenizer.encode(text)
            text += "</s>and then some"


def test_tokens_that_others_may_hide_are_no_borders() -> None:
    texts = {border.text for border in Tokenizer(MORE_KINDS["overlapping"](), TokenizerConfig()).border_tokens}
    assert texts == {"the </"}
    texts = {border.text for border in Tokenizer(MORE_KINDS["stripping"](), TokenizerConfig()).border_tokens}
    assert texts == {"<s>", "</s>", "<|tool|>", "<|l|>", "<|r|>"}
    texts = {border.text for border in Tokenizer(MORE_KINDS["normalized"](), TokenizerConfig()).border_tokens}
    assert texts == {"<s>", "</s>", "<|tool|>"}


def test_where_special_tokens_in_a_text_are_text_only_others_are_borders() -> None:
    tokenizer = Tokenizer(KINDS["gpt4"](), TokenizerConfig(splits_special_tokens=True))
    assert {border.text for border in tokenizer.border_tokens} == {"<|tool|>"}


class Counting(Tokenizer):
    """Counts the characters that it encodes."""

    num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> array[int]:
        self.num_chars += len(text)
        return super().encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def turns(num_turns: int, seed: int) -> list[str]:
    """The prompts of one conversation, each with the reply to the one before."""
    rng, template = random.Random(seed), ChatTemplate(CHATML, {})
    messages, prompts = [{"role": "system", "content": "You are of help. " * 200}], []
    for _ in range(num_turns):
        messages.append({"role": "user", "content": drawn(rng, 40)})
        prompts.append(template.render(messages, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": drawn(rng, 40)})
    return prompts


def test_a_turn_costs_its_new_text_also_beside_other_conversations() -> None:
    tokenizer = Counting(KINDS["qwen"](), TokenizerConfig())
    encoder = TurnEncoder(tokenizer)
    conversations = [turns(12, seed) for seed in range(5)]
    for number, prompts in enumerate(zip(*conversations, strict=True)):
        for prompt, others in zip(prompts, conversations, strict=True):
            tokenizer.num_chars = 0
            ids = encoder.encode(prompt, root=ROOT)
            num_new = len(prompt) - (len(others[number - 1]) if number else 0)
            # The prompt before ended with "<s>assistant\n".
            assert tokenizer.num_chars <= num_new + len("<s>assistant\n") or number == 0
            assert ids == Tokenizer.encode(tokenizer, prompt)


def test_texts_of_another_root_are_not_continued() -> None:
    tokenizer = Counting(KINDS["qwen"](), TokenizerConfig())
    encoder, prompt = TurnEncoder(tokenizer), turns(1, 0)[0]
    for root in (b"a", b"b"):
        tokenizer.num_chars = 0
        encoder.encode(prompt, root=root)
        assert tokenizer.num_chars == len(prompt)


def test_no_more_text_is_kept_than_asked_for() -> None:
    encoder = TurnEncoder(Tokenizer(KINDS["gpt4"](), TokenizerConfig()), max_kept_chars=20_000)
    for seed in range(20):
        encoder.encode(drawn(random.Random(seed), 1000), root=ROOT)
        assert sum(len(kept.text) for kept in encoder._kept) == encoder._num_kept_chars <= 20_000
        assert set(encoder._by_key.values()) <= set(encoder._kept)
    assert encoder._kept


def test_a_turn_with_too_many_tokens_says_how_many_there_are_at_least() -> None:
    tokenizer = Tokenizer(KINDS["gpt4"](), TokenizerConfig())
    encoder, text = TurnEncoder(tokenizer), "<s>" + "hello there " * 200 + "</s>"
    num_tokens = len(encoder.encode(text, root=ROOT))
    for more in ("", "and more"):
        for most in (1, num_tokens - 1):
            with pytest.raises(TooManyTokens) as error:
                encoder.encode(text + more, root=ROOT, max_tokens=most)
            assert error.value.at_least > most
    assert len(encoder.encode(text, root=ROOT, max_tokens=num_tokens)) == num_tokens
