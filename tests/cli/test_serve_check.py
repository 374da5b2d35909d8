"""`medha serve --check`: what a checkpoint is and takes, without a server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.cli.medha import main
from megatron_medha.cli.parts import checkpoint_process
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.parallel.groups import build_groups, init_distributed
from megatron_medha.tiny.tiny_tokenizer import save_tiny_tokenizer
from tests.model.megatron_models import megatron_model, recorded_args, save_megatron
from tests.model.test_megatron_exactness import MODELS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek of Megatron's."""
    directory = tmp_path_factory.mktemp("deepseek") / "small"
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    args = recorded_args("0.16.0", **MODELS["deepseek"], padded_vocab_size=640)
    save_megatron(megatron_model(args, build_groups(ParallelLayout())), args, directory)
    save_tiny_tokenizer(directory, 512)
    return directory


def check(saved: Path, *words: str) -> int:
    return main(["serve", "--check", f"checkpoint={saved}", "model.kv_memory_gib=0.01", "model.device=cpu", *words])


def test_the_check_says_what_the_model_is_and_what_it_takes(saved: Path, capsys: pytest.CaptureFixture[str]):
    assert check(saved, "parallel.tp=2") == 0
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "torch_dist" in printed["checkpoint"] and "iter_0000010" in printed["checkpoint"]
    assert "4 layers of 64" in printed["model"] and "8 experts of which 3 a token" in printed["model"]
    assert "experts" in printed["traits"] and "latent attention" in printed["traits"]
    assert "Megatron's own" in printed["layers"]
    # The latent vector's 32 numbers and 8 with a position, as key and as value, in 4 layers, on both ranks.
    assert "1,280 bytes for a token on each rank; 4,096 tokens" in printed["KV"]
    assert f"{int(0.01 * (1 << 30)) // 1280:,} tokens at a time" in printed["memory"]
    assert "parallel.tp=1, 2, 4; parallel.spp=1, 2, 4" in printed["layouts"]


def test_a_layout_that_does_not_divide_the_model_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]):
    assert check(saved, "parallel.tp=3") == 2
    assert "parallel.tp=3 must divide model.num_heads=4" in capsys.readouterr().err


def test_a_refused_model_says_why(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = recorded_args("main", use_mup=True)
    save_megatron(megatron_model(recorded_args("main"), build_groups(ParallelLayout())), args, tmp_path / "mup")
    save_tiny_tokenizer(tmp_path / "mup", 509)
    assert check(tmp_path / "mup") == 1
    assert "args.use_mup=True is not supported" in capsys.readouterr().err


def test_a_megatron_model_is_refused_once_with_all_reasons_before_the_server_listens(
    start: Callable[..., Any], saved: Path, tmp_path: Path
):
    args = recorded_args("main", use_mup=True, vision_pretraining=True)
    save_megatron(megatron_model(recorded_args("main"), build_groups(ParallelLayout())), args, tmp_path / "mup")
    save_tiny_tokenizer(tmp_path / "mup", 509)
    medha = start("serve", str(tmp_path / "mup"), "server.port=0", "model.device=cpu", "model.kv_memory_gib=0.01")
    assert medha.end() == 2
    message = medha.errors.read_text()
    assert "args.use_mup=True" in message and "args.vision_pretraining=True" in message
    assert message.count("args.use_mup") == 1 and "engine_failed" not in message
    assert medha.printed == ""


def test_a_zero_checkpoint_without_its_step_is_refused_before_the_server_listens(
    start: Callable[..., Any], saved: Path, tmp_path: Path
):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_text("global_step7")
    save_tiny_tokenizer(tmp_path / "zero", 509)
    medha = start("serve", str(tmp_path / "zero"), "server.port=0", "model.device=cpu")
    assert medha.end() == 2
    assert "global_step7" in medha.errors.read_text()
    assert medha.printed == ""


def test_a_check_that_breaks_refuses_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch):
    for code in ("import os; os.abort()", "print('noise'); raise ImportError('torch')"):
        monkeypatch.setattr(checkpoint_process, "_COMMAND", (sys.executable, "-c", code))
        checkpoint_process.begin_check(RankConfig(server_endpoint="", checkpoint=str(saved), kv_memory_bytes=None))()


def test_a_simulated_model_has_nothing_to_check(capsys: pytest.CaptureFixture[str], saved: Path):
    words = ["serve", "--check", "runtime=sim", "model=llama3_8b", "hardware=h100", f"tokenizer={saved}"]
    assert main(words) == 2
    assert "--check: reads a checkpoint" in capsys.readouterr().err


def test_other_commands_have_no_check(capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", "--check"]) == 2
    assert "--check: only medha serve" in capsys.readouterr().err
