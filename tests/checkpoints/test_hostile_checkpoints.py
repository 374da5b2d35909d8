"""Checkpoints made by strangers: none runs code, changes the process, writes a file, hangs the load or fills memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_medha.checkpoints.megatron_checkpoint import save_megatron_checkpoint
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import build_groups, init_distributed
from megatron_medha.safe_files.safe_pickle import load_torch_file
from megatron_medha.tiny.tiny_tokenizer import save_tiny_tokenizer
from tests.checkpoints.hostile_files import HUGGING_FACE, MEGATRON, TOKENIZER

LOADING = Path(__file__).with_name("hostile_loading.py")
CONFIG = ModelConfig(
    name="small", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=100, max_context_len=128, norm_epsilon=1e-6, rope_theta=10000.0,
)  # fmt: skip
CASES = {"megatron": MEGATRON, "hugging face": HUGGING_FACE, "tokenizer": TOKENIZER}
NAMES = [name for cases in CASES.values() for name in cases]


def sound_checkpoints(home: Path) -> dict[str, Path]:
    transformers = pytest.importorskip("transformers")
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    model = build_model(
        CONFIG, dtype=torch.float32, device=torch.device("cpu"), pgs=build_groups(ParallelLayout())
    )
    save_megatron_checkpoint(model, CONFIG, home / "sound megatron", 1)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(home / "sound hugging face")
    (home / "sound tokenizer").mkdir()
    save_tiny_tokenizer(home / "sound tokenizer", 512)
    return {kind: home / f"sound {kind}" for kind in CASES}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def outcomes(home: Path) -> dict[str, dict[str, object]]:
    """What came of each case, by its name. One process tries them all; after one that kills it, the next goes on."""
    sound = sound_checkpoints(home)
    for kind, cases in CASES.items():
        for name, (spoil, _) in cases.items():
            shutil.copytree(sound[kind], home / name)
            spoil(home / name)
    waiting = [*(path.name for path in sound.values()), *NAMES]
    found: dict[str, dict[str, object]] = {}
    (home / "scratch").mkdir()
    while waiting:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", str(LOADING), *(str(home / name) for name in waiting)],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=home / "scratch", timeout=900,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        for line in run.stdout.splitlines():
            if line.startswith('{"name"'):
                result = json.loads(line)
                found[result["name"]] = result
        tried = [name for name in waiting if name in found]
        assert tried or waiting[0] in NAMES, run.stderr
        waiting = waiting[len(tried) :]
        if run.returncode and waiting:
            found[waiting[0]] = {"result": f"killed the process: {run.stderr[-300:]}", "changed": []}
            waiting = waiting[1:]
    return found


def test_the_sound_checkpoints_are_loaded_under_the_same_limits(outcomes: dict[str, dict[str, object]]):
    assert {outcomes[f"sound {kind}"]["result"] for kind in CASES} == {"loaded"}


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_refused_by_its_name_and_changes_nothing(name: str, outcomes: dict[str, dict[str, object]]):
    file_name = {**MEGATRON, **HUGGING_FACE, **TOKENIZER}[name][1]
    result = str(outcomes[name]["result"])
    assert result.startswith("refused: ") and file_name in result or (not file_name and result == "loaded"), result
    assert len(result) < 8500, 'a message to read'
    assert outcomes[name]["changed"] == []


def test_no_hostile_file_wrote_a_file(home: Path, outcomes: dict[str, dict[str, object]]):
    assert outcomes
    assert not list((home / "scratch").iterdir())
    assert not list(home.glob("*/written by*"))


def test_an_archive_of_more_than_four_gigabytes_is_read(tmp_path: Path):
    with torch.serialization.skip_data():  # a hole in the file
        torch.save({"large": torch.empty((1 << 30) + 9), "after": torch.empty(3)}, tmp_path / "large.pt")
    found = load_torch_file(tmp_path / "large.pt")
    assert found["large"].shape == ((1 << 30) + 9,) and not found["large"][-9:].any()
    assert found["after"].tolist() == [0.0] * 3


def test_tensors_of_every_kind_are_read_as_torch_reads_them(tmp_path: Path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    saved = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in dtypes}
    base = torch.randn(5, 6)
    saved |= {"transposed": base.T, "strided": base[1:, ::2], "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    saved |= {"parameter": torch.nn.Parameter(base), "expanded from one": torch.ones(1).expand(1, 1)}
    torch.save(saved, tmp_path / "all.pt")
    found = load_torch_file(tmp_path / "all.pt")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
