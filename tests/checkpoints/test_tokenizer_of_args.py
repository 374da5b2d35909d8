"""The tokenizer that a Megatron checkpoint's arguments name, where no other is beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.tokenizer_facts import tokenizer_facts
from megatron_medha.safe_files.saved_args import read_saved_args
from megatron_medha.text.tokenizer import Tokenizer
from tests.text.tokenizer_makers import byte_ranks, write_gpt2, write_megatron_tiktoken, write_pieces


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    iteration = tmp_path / "run" / "iter_0000005"
    iteration.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    return tmp_path / "run"


def save_args(checkpoint: Path, **args: Any) -> None:
    common = {"args": argparse.Namespace(params_dtype=torch.bfloat16, **args), "iteration": 5}
    torch.save(common, checkpoint / "iter_0000005" / "common.pt")


def test_arguments_are_read_without_torch_as_they_were_saved(checkpoint: Path) -> None:
    save_args(checkpoint, tokenizer_type="X", sizes=[1, 2], betas=(0.9, 0.95), more={"a": None})
    args = read_saved_args(checkpoint / "iter_0000005")
    assert (args["tokenizer_type"], args["sizes"]) == ("X", [1, 2])
    assert (args["betas"], args["more"]) == ((0.9, 0.95), {"a": None})


@pytest.mark.parametrize("is_beside", [True, False])
def test_gpt2_files_of_the_arguments(checkpoint: Path, tmp_path: Path, is_beside: bool) -> None:
    where = checkpoint if is_beside else tmp_path
    write_gpt2(tmp_path)
    for name, new in (("vocab.json", "my-vocab.json"), ("merges.txt", "my-merges.txt")):
        (tmp_path / name).rename(where / new)
    stated = "/gone/" if is_beside else f"{tmp_path}/"
    save_args(
        checkpoint, tokenizer_type="GPT2BPETokenizer", vocab_file=f"{stated}my-vocab.json",
        merge_file=f"{stated}my-merges.txt",
    )  # fmt: skip
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer.decode(tokenizer.encode("def f(x):").tolist()) == "def f(x):"
    assert tokenizer_facts(checkpoint) == (tokenizer.vocab_size, (tokenizer.eos_token_id,))
    assert Tokenizer.load(checkpoint / "iter_0000005").vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("kind", "begins"),
    [("SentencePieceTokenizer", False), ("GPTSentencePieceTokenizer", False), ("Llama2Tokenizer", True)],
)
def test_a_sentencepiece_model_of_the_arguments(checkpoint: Path, tmp_path: Path, kind: str, begins: bool) -> None:
    pytest.importorskip("sentencepiece")
    write_pieces(tmp_path / "mine.spm")
    save_args(checkpoint, tokenizer_type=kind, tokenizer_model=str(tmp_path / "mine.spm"))
    tokenizer = Tokenizer.load(checkpoint)
    assert (tokenizer.encode("the server")[0] == tokenizer.bos_token_id) is begins
    assert tokenizer_facts(checkpoint) == (tokenizer.vocab_size, (2,))


def test_a_tiktoken_file_of_the_arguments(checkpoint: Path, tmp_path: Path) -> None:
    write_megatron_tiktoken(tmp_path / "mine.json", byte_ranks())
    save_args(
        checkpoint, tokenizer_type="TikTokenizer", tokenizer_model=str(tmp_path / "mine.json"), tiktoken_pattern="v1",
        tiktoken_num_special_tokens=10, tiktoken_special_tokens=None, vocab_size=400,
    )  # fmt: skip
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer.encode("a</s>").tolist() == [10 + ord("a"), 2]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (400, 2)


def test_a_hugging_face_directory_of_the_arguments(checkpoint: Path, tmp_path: Path) -> None:
    from megatron_medha.tiny.tiny_tokenizer import save_tiny_tokenizer

    (tmp_path / "hf").mkdir()
    save_tiny_tokenizer(tmp_path / "hf", 64)
    save_args(checkpoint, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "hf"))
    assert Tokenizer.load(checkpoint).vocab_size == 264
    save_args(checkpoint, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="org/name")
    with pytest.raises(CheckpointError, match="names the tokenizer 'org/name', which is not on this machine"):
        Tokenizer.load(checkpoint)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"tokenizer_type": "NullTokenizer"}, "tokenizer_type='NullTokenizer' cannot be read; .*tokenizer=DIR"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/gone/v.json"}, "vocab_file='/gone/v.json', which is"),
        ({"tokenizer_type": "TikTokenizer", "tokenizer_model": "x" * 5000}, "tokenizer_model='xxx"),
        ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": 5}, "tokenizer_model=5, which is not"),
        ({}, "no tokenizer there"),
    ],
)
def test_what_the_arguments_do_not_lead_to_is_named(checkpoint: Path, args: dict[str, Any], why: str) -> None:
    save_args(checkpoint, **args)
    with pytest.raises(CheckpointError, match=why):
        Tokenizer.load(checkpoint)
    assert tokenizer_facts(checkpoint) == (None, ())  # tokenizer=DIR may name another


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip"])
def test_arguments_that_cannot_be_read_are_named(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "iter_0000005" / "common.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"common\.pt: cannot be read"):
        Tokenizer.load(checkpoint)
