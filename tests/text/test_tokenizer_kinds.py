"""Tokenizers that are no tokenizer.json: their own libraries' ids on 10,000 texts, and what a server needs of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_medha.core.errors import CheckpointError
from megatron_medha.text.detokenizer import make_detokenizer
from megatron_medha.text.tokenizer import Tokenizer
from megatron_medha.text.tokenizers.tokenizer_json import PATTERNS
from megatron_medha.text.turn_encoder import TurnEncoder
from tests.text.tokenizer_makers import (
    END,
    SPECIAL,
    byte_ranks,
    write_gpt2,
    write_megatron_tiktoken,
    write_pieces,
    write_tiktoken,
)
from tests.text.tokenizer_texts import texts

COUNT = 10_000
FILLERS = 20
PIECES = {
    "unigram": {},
    "unigram without normalisation": {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
    },
    "bpe as Llama 2's": {
        "model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "byte_fallback": True, "split_digits": True,
    },
    "bpe, normalised, with symbols": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "[X]"]},
    "no space before a text": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
}  # fmt: skip


def differing(tokenizer: Tokenizer, theirs: Callable[[str], list[int]], special: tuple[str, ...]) -> list[str]:
    """The texts whose ids are others than theirs."""
    return [
        text for text in texts(COUNT, special)
        if tokenizer.encode(text, add_special_tokens=False).tolist() != theirs(text)
    ]  # fmt: skip


def check_server_needs(tokenizer: Tokenizer, end: str | None) -> None:
    """Text that is streamed is the whole text; a next turn is encoded as the whole; the end token is known."""
    assert end is None or tokenizer.eos_token_id == tokenizer.token_id(end)
    for text in texts(300, ()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = make_detokenizer(tokenizer, (), skip_special_tokens=True)
        streamed = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.finish()
        whole = tokenizer.decode(ids)  # without the space that SentencePiece puts before a text
        assert streamed in (whole, f" {whole}")
    turns = TurnEncoder(tokenizer)
    chat = ""
    for turn in range(4):
        chat += f"{end or ''}turn {turn}: " + "words of a long turn, " * 20
        assert turns.encode(chat, root=b"").tolist() == tokenizer.encode(chat).tolist()
    long = texts(1, ())[0] + " ".join(f"word{number} and {number % 7}" for number in range(12_000))
    whole = tokenizer._backend.encode_batch_fast([long], add_special_tokens=False)[0].ids
    assert tokenizer.encode(long, add_special_tokens=False).tolist() == whole


def test_gpt2_files_give_the_ids_of_their_library(tmp_path: Path) -> None:
    import tokenizers

    write_gpt2(tmp_path)
    theirs = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    theirs.add_special_tokens([END])
    tokenizer = Tokenizer.load(tmp_path)
    assert not differing(tokenizer, lambda text: theirs.encode(text).ids, (END,))
    check_server_needs(tokenizer, END)


@pytest.mark.parametrize("name", PIECES)
def test_a_sentencepiece_model_gives_the_ids_of_its_library(tmp_path: Path, name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    write_pieces(tmp_path / "tokenizer.model", **PIECES[name])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    # The library takes the names of special tokens in a text for text.
    (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    assert not differing(Tokenizer.load(tmp_path), theirs.encode, ("<s>", "</s>", "<unk>", "<sep>"))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(tmp_path)
    assert not differing(tokenizer, lambda text: _at_names(theirs, text), ("<s>", "</s>"))
    check_server_needs(tokenizer, "</s>")


def _at_names(processor: object, text: str) -> list[int]:
    """As Megatron: what is between special tokens is encoded by itself."""
    ids: list[int] = []
    for place, first in enumerate(text.split("<s>")):
        ids += [1] * (place > 0)
        for number, second in enumerate(first.split("</s>")):
            ids += [2] * (number > 0)
            for third, rest in enumerate(second.split("<unk>")):
                ids += [0] * (third > 0) + processor.encode(rest)  # type: ignore[attr-defined]
    return ids


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_a_tiktoken_file_gives_the_ids_of_its_library(tmp_path: Path, pattern: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = byte_ranks()
    write_tiktoken(tmp_path / "mine.tiktoken", ranks)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tiktoken_pattern": pattern, "eos_token": END, "added_tokens_decoder": {
            str(len(ranks)): {"content": END, "special": True, "normalized": False}}}
    ))  # fmt: skip
    theirs = tiktoken.Encoding(
        "mine", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path)
    assert not differing(tokenizer, lambda text: theirs.encode(text, allowed_special="all"), (END,))
    if pattern == "cl100k":
        check_server_needs(tokenizer, END)


def test_megatrons_tiktoken_json_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = byte_ranks()
    write_megatron_tiktoken(tmp_path / "vocab.json", ranks)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tiktoken_num_special_tokens": FILLERS}))
    names = [*SPECIAL, *(f"<SPECIAL_{place}>" for place in range(len(SPECIAL), FILLERS))]
    theirs = tiktoken.Encoding(
        "megatron", pat_str=PATTERNS["v2"], mergeable_ranks={token: FILLERS + rank for token, rank in ranks.items()},
        special_tokens={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path)
    special = ("<s>", "</s>", "<mask>", "<SPECIAL_12>")
    assert not differing(tokenizer, lambda text: theirs.encode(text, allowed_special="all"), special)
    check_server_needs(tokenizer, "</s>")


def broken() -> Iterator[tuple[str, dict[str, bytes], str]]:
    yield "nothing", {}, "no tokenizer there. Looked for .* It is empty"
    yield "a model file that is none", {"tokenizer.model": b"\n\x05abc"}, "no SentencePiece model, or a damaged one"
    yield "a tiktoken file cut off", {"a.tiktoken": b"IQ== 0\nIg=="}, "line 2"
    yield "an unknown pattern", {"a.tiktoken": b"IQ== 0\n"}, "how these split a text is not known.*tiktoken_pattern"
    yield "files of two", {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "the two files belong to different"
    yield "no merges", {"vocab.json": b'{"a": 0}', "merges.txt": b"abc\n"}, "line 1 is 'abc', not two tokens"
    yield "no vocabulary", {"vocab.json": b'{"a": ', "merges.txt": b""}, "is no vocabulary of tokens and ids"


@pytest.mark.parametrize(("files", "why"), [case[1:] for case in broken()], ids=[case[0] for case in broken()])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, files: dict[str, bytes], why: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        Tokenizer.load(tmp_path)


def test_a_truncated_sentencepiece_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    write_pieces(tmp_path / "whole.model")
    content = (tmp_path / "whole.model").read_bytes()
    (tmp_path / "whole.model").unlink()
    for place in range(1, len(content), len(content) // 20):
        (tmp_path / "tokenizer.model").write_bytes(content[:place])
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            Tokenizer.load(tmp_path).encode("a b")


def test_of_two_kinds_one_goes_first_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gpt2(tmp_path)
    write_tiktoken(tmp_path / "mine.tiktoken", byte_ranks(400))
    caplog.set_level("INFO")
    with pytest.raises(CheckpointError, match="tiktoken_pattern"):
        Tokenizer.load(tmp_path)  # a tiktoken file goes before GPT-2's
    chosen = next(record for record in caplog.records if record.message == "tokenizer_chosen")
    assert chosen.fields["passed_over"] == ["vocab.json"]  # type: ignore[attr-defined]
