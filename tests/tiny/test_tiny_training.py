"""The tiny model's training: it learns, it leaves a whole checkpoint or none, its tokenizer loses nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_medha.checkpoints.detect import find_checkpoint, load_weights, read_model_config
from megatron_medha.checkpoints.megatron_checkpoint import MEGATRON
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import build_groups, init_distributed
from megatron_medha.tiny import tiny_training as module
from megatron_medha.tiny.new_checkpoint import unfinished
from megatron_medha.tiny.tiny_corpus import draw_starts, read_stdlib, windows
from megatron_medha.tiny.tiny_tokenizer import (
    ASSISTANT_ID,
    EOS_ID,
    NUM_BYTES,
    SPECIAL_TOKENS,
    USER_ID,
    VOCAB_SIZE,
    decode_bytes,
    save_tiny_tokenizer,
)
from megatron_medha.tiny.tiny_training import TrainTinyConfig, train_tiny

TINY = TrainTinyConfig(
    seconds=600.0, max_steps=20, num_layers=1, hidden_size=32, ffn_hidden_size=64, num_heads=2, num_kv_heads=1,
    sequence_len=64, batch_size=8, num_warmup_steps=2, learning_rate=1e-2, num_sample_tokens=8, is_quiet=True,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> None:
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus():
    return read_stdlib(0)


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch, corpus):
    monkeypatch.setattr(module, "read_stdlib", lambda seed: corpus)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from tokenizers import Tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(directory, 1024)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_twenty_steps_lower_the_loss_and_leave_a_checkpoint_that_loads(tmp_path: Path):
    result = train_tiny(tmp_path / "tiny", TINY)
    assert result.num_steps == 20
    assert result.held_out_loss_nats < 0.8 * result.untrained_loss_nats
    assert result.sample.startswith("import os")
    assert find_checkpoint(tmp_path / "tiny")[0] is MEGATRON
    config = read_model_config(tmp_path / "tiny")
    assert (config.vocab_size, config.max_context_len, config.stop_token_ids) == (VOCAB_SIZE, 131_072, (EOS_ID,))
    groups = build_groups(ParallelLayout())
    model = build_model(config, dtype=torch.float32, device=torch.device("cpu"), pgs=groups, is_initialized=False)
    load_weights(model, config, tmp_path / "tiny", lambda what, fraction: None)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_same_seed_and_steps_give_the_same_model(tmp_path: Path):
    first, second = (train_tiny(tmp_path / name, TINY) for name in ("first", "second"))
    assert first.held_out_loss_nats == second.held_out_loss_nats
    assert first.sample == second.sample


def test_the_report_states_both_losses_and_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train_tiny(tmp_path / "tiny", replace(TINY, max_steps=2, is_quiet=False))
    out, err = capsys.readouterr()
    assert out.count("nats/byte") == out.count("bits/byte") == 2
    assert "import os" in out and str(tmp_path / "tiny") in out
    assert "loss" in err and "left" in err


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_behind(
    interruption: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object) -> float:
        raise interruption

    monkeypatch.setattr(module._Trainer, "_step", stop)
    with pytest.raises(interruption):
        train_tiny(tmp_path / "tiny", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_megatron_checkpoint", fail)
    with pytest.raises(OSError, match="disk full"):
        train_tiny(tmp_path / "tiny", replace(TINY, max_steps=1))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_refused_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="directory=.*: cannot be written"), unfinished(
        tmp_path / "file" / "tiny"
    ):
        pass


def test_what_is_already_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "precious").write_text("work")
    with pytest.raises(ConfigError, match="already exists"):
        train_tiny(tmp_path, TINY)
    assert (tmp_path / "precious").read_text() == "work"


def test_a_shape_that_cannot_be_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="num_heads=3"):
        train_tiny(tmp_path / "tiny", TrainTinyConfig(num_heads=3, is_quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["seconds", "max_steps", "num_layers", "num_kv_heads", "num_sample_tokens"])
def test_a_zero_that_cannot_be_trained_with_is_refused_by_name(key: str):
    with pytest.raises(ConfigError, match=f"^{key}=0: must be between 1 and "):
        replace(TINY, **{key: 0})


@pytest.mark.parametrize(("config", "message"), [
    (replace(TINY, hidden_size=12, num_heads=4), "hidden_size=12, num_heads=4: .* must be even"),
    (replace(TINY, sequence_len=1 << 30), "^sequence_len=1073741824: must be between 1 and "),
])  # fmt: skip
def test_a_shape_that_cannot_be_trained_leaves_nothing(config: TrainTinyConfig, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        train_tiny(tmp_path / "tiny", config)
    assert list(tmp_path.iterdir()) == []


def test_held_out_files_are_not_trained_on(corpus):
    assert corpus.num_held_out_files >= 5
    held_out = decode_bytes(corpus.held_out_ids.tolist()[:2000])
    assert held_out not in decode_bytes(corpus.training_ids.tolist())


def test_documents_and_answers_end_with_the_end_token(corpus):
    ids = corpus.training_ids
    assert int((ids == EOS_ID).sum()) == corpus.num_training_files + 2 * int((ids == USER_ID).sum())
    assert int((ids == USER_ID).sum()) == int((ids == ASSISTANT_ID).sum()) > 1000
    assert int(ids[-1]) == EOS_ID and int(ids.max()) < VOCAB_SIZE


def test_targets_are_the_inputs_one_token_on():
    ids = torch.arange(100)
    starts = draw_starts(ids, 10, 4, torch.Generator().manual_seed(0))
    inputs, targets = windows(ids, 10, starts)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[:, 0], starts)
    assert torch.equal(targets, inputs + 1)


def test_text_is_encoded_as_its_bytes(tokenizer):
    for text in ("", "x", " leading and  double spaces\n\ttabs\r\n", "naïve café 日本語 🙂", "\x00\x7f\u0080ÿ"):
        assert tokenizer.encode(text).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text


def test_any_ids_survive_decoding_and_encoding_of_their_text(tokenizer):
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(VOCAB_SIZE) for _ in range(40)]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_each(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    for index, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token).ids == [NUM_BYTES + index]
    assert tokenizer.decode([EOS_ID]) == ""


def test_transformers_reads_the_tokenizer_and_its_chat_template(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    save_tiny_tokenizer(tmp_path, 1024)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == EOS_ID
    assert tokenizer("abc")["input_ids"] == list(b"abc")
    messages = [{"role": "user", "content": "Sort a list."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Sort a list.<|eos|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [USER_ID, *b"Sort a list.", EOS_ID, ASSISTANT_ID]
