"""Checkpoints of DeepSpeed's ZeRO engine: the logits of the trained model, and errors that name file and key."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.checkpoints.detect import find_checkpoint, load_weights, read_model_config
from megatron_medha.checkpoints.zero_checkpoint import ZERO
from megatron_medha.core.errors import CheckpointError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed

pytest.importorskip("deepspeed")
transformers = pytest.importorskip("transformers")

TRAINING = Path(__file__).with_name("zero_training.py")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def trained(directory: Path, stage: int, kind: str) -> Path:
    """A checkpoint of two ranks after one step."""
    if kind == "transformers":
        config = transformers.LlamaConfig(
            vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", str(TRAINING), str(directory), "--stage", str(stage), "--kind", kind],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert outcome.returncode == 0, outcome.stderr
    (directory / "model.safetensors").unlink(missing_ok=True)  # what it began with
    return directory


@pytest.fixture(scope="module")
def of_megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("zero-megatron"), 3, "megatron")


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("zero-transformers"), 1, "transformers")


@pytest.fixture
def copied(of_megatron: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(of_megatron, tmp_path / "copy"))


def load(directory: Path, groups: MedhaPGs) -> Any:
    config = read_model_config(directory)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    load_weights(model, config, directory, lambda what, fraction: None)
    return model


@pytest.mark.parametrize("kind", ["megatron", "transformers"])
def test_logits_are_those_of_the_trained_model(kind: str, groups: MedhaPGs, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(f"of_{kind}")
    assert find_checkpoint(directory)[0] is ZERO
    model = load(directory, groups)
    with torch.no_grad():
        logits = model(torch.arange(40).view(1, 40), None, None)[..., :101]
    expected = torch.load(directory / "expected.pt")[..., :101]
    # fp32 sums in another order, and angles of transformers in fp32.
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def step_of(directory: Path) -> Path:
    return directory / (directory / "latest").read_text().strip()


def test_a_file_that_is_cut_off_is_named(copied: Path, groups: MedhaPGs) -> None:
    path = sorted(step_of(copied).glob("*_optim_states.pt"))[1]
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read, damaged or incomplete"):
        load(copied, groups)


def test_a_missing_piece_is_named_with_how_many_there_should_be(copied: Path, groups: MedhaPGs) -> None:
    sorted(step_of(copied).glob("*_optim_states.pt"))[1].unlink()
    with pytest.raises(CheckpointError, match="Expected 2 of .* but found 1"):
        load(copied, groups)


def test_tensors_that_do_not_fit_the_architecture_are_named(copied: Path, groups: MedhaPGs) -> None:
    for path in step_of(copied).glob("*_model_states.pt"):
        states = torch.load(path, weights_only=False)
        states["args"].num_layers = 3
        states["args"].ffn_hidden_size = 112
        torch.save(states, path)
    with pytest.raises(CheckpointError) as caught:
        load(copied, groups)
    message = str(caught.value)
    assert "tensor decoder.layers.2.mlp.linear_fc1.weight is missing" in message
    assert "tensor decoder.layers.0.mlp.linear_fc2.weight has shape [64, 96], the model's is [64, 112]" in message


def test_weights_that_are_no_numbers_are_named(copied: Path, groups: MedhaPGs) -> None:
    for path in step_of(copied).glob("*_optim_states.pt"):
        states = torch.load(path, weights_only=False)
        for flat in states["optimizer_state_dict"]["fp32_flat_groups"]:
            flat.data.fill_(torch.nan)
        torch.save(states, path)
    with pytest.raises(CheckpointError, match=r"decoder.final_layernorm.weight.*and \d+ more: NaN or infinity"):
        load(copied, groups)


def test_a_program_in_place_of_states_is_refused(copied: Path, groups: MedhaPGs) -> None:
    path = sorted(step_of(copied).glob("*_optim_states.pt"))[1]
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read"):
        load(copied, groups)


def test_a_piece_named_again_and_again_makes_no_larger_model(copied: Path, groups: MedhaPGs) -> None:
    for path in step_of(copied).glob("*_optim_states.pt"):
        states = torch.load(path, weights_only=False)
        state = states["optimizer_state_dict"]
        state["fp32_flat_groups"] = [state["fp32_flat_groups"][0]] * 100_000
        torch.save(states, path)
    with pytest.raises(CheckpointError, match=r"_optim_states\.pt: its tensors are larger than the file"):
        load(copied, groups)


def test_a_model_far_larger_than_its_weights_is_refused_at_once(copied: Path) -> None:
    for path in step_of(copied).glob("*_model_states.pt"):
        states = torch.load(path, weights_only=False)
        states["args"].num_layers = 10**9
        torch.save(states, path)
    with pytest.raises(CheckpointError, match=r"_model_states\.pt: describes a model of 1000000000 layers"):
        read_model_config(copied)


def test_a_step_outside_of_the_directory_is_refused(copied: Path) -> None:
    (copied / "latest").write_text("../" + copied.name)
    with pytest.raises(CheckpointError, match="latest: names .* no file inside"):
        find_checkpoint(copied)


def test_a_step_that_is_not_there_is_named(copied: Path) -> None:
    (copied / "latest").write_text("global_step77")
    with pytest.raises(CheckpointError, match="global_step77: no such directory"):
        find_checkpoint(copied)


def test_one_trained_with_tensor_parallelism_is_refused(copied: Path) -> None:
    step = step_of(copied)
    (step / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="mp_rank_01_model_states.pt: trained with tensor or pipeline"):
        find_checkpoint(copied)
