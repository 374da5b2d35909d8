"""LoRA adapters: the base model with their products added, or refused with the key at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_medha.checkpoints.detect import find_checkpoint, load_weights, read_model_config
from megatron_medha.checkpoints.lora_adapter import LORA
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from tests.checkpoints.test_checkpoint_hf import make_checkpoint

CPU = torch.device("cpu")
Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base model, and beside it an adapter of one of its modules."""
    (tmp_path / "base").mkdir()
    make_checkpoint(tmp_path / "base", model_type="llama")
    save_adapter(tmp_path, factors(tmp_path, Q0))
    return tmp_path


def factors(home: Path, *modules: str, rank: int = 4, is_transposed: bool = False) -> dict[str, Tensor]:
    weights = load_file(home / "base" / "model.safetensors")
    found = {}
    for module in modules:
        outputs, inputs = weights[f"{module}.weight"].shape[:: -1 if is_transposed else 1]
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank)
    return found


def save_adapter(home: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    (home / "adapter").mkdir(exist_ok=True)
    save_file(tensors, home / "adapter" / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA", "base_model_name_or_path": "../base", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj"], "bias": "none", "use_dora": False, "lora_dropout": 0.1, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(fields | config))


def parameters(directory: Path, groups: MedhaPGs) -> dict[str, Tensor]:
    config = read_model_config(directory)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    return dict(model.named_parameters())


def assert_merged(home: Path, added: dict[str, Tensor], groups: MedhaPGs) -> None:
    """The adapter's model is the base model with these added to its tensors."""
    found = parameters(home / "adapter", groups)
    weights = load_file(home / "base" / "model.safetensors")
    for key, delta in added.items():
        weights[key] = weights[key] + delta
    save_file(weights, home / "base" / "model.safetensors", metadata={"format": "pt"})
    expected = parameters(home / "base", groups)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-5) for name in expected)


def product(home: Path, module: str) -> Tensor:
    tensors = load_file(home / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{each}.weight"] for each in "AB")
    return b @ a


def test_products_are_added_to_the_base_models_weights(home: Path, groups: MedhaPGs) -> None:
    save_adapter(home, factors(home, Q0, UP1))
    assert find_checkpoint(home / "adapter")[0] is LORA
    assert read_model_config(home / "adapter").name == "adapter"
    assert_merged(home, {f"{module}.weight": 2.0 * product(home, module) for module in (Q0, UP1)}, groups)


def test_scales_by_pattern_and_by_the_root_of_the_rank(home: Path, groups: MedhaPGs) -> None:
    save_adapter(home, factors(home, Q0, UP1), use_rslora=True, alpha_pattern={"mlp.up_proj": 6})
    added = {f"{Q0}.weight": 4.0 * product(home, Q0), f"{UP1}.weight": 3.0 * product(home, UP1)}
    assert_merged(home, added, groups)


def test_a_module_saved_in_full_replaces_the_base_models(home: Path, groups: MedhaPGs) -> None:
    head = torch.randn(101, 64)
    save_adapter(home, {**factors(home, Q0), "base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"])
    found = parameters(home / "adapter", groups)
    assert torch.equal(found["output_layer.weight"], head)


def test_weights_stored_the_other_way_round_take_transposed_products(tmp_path: Path, groups: MedhaPGs) -> None:
    (tmp_path / "base").mkdir()
    make_checkpoint(
        tmp_path / "base", model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96,
        num_key_value_heads=4,
    )  # fmt: skip
    module = "transformer.h.1.mlp.c_fc"
    save_adapter(tmp_path, factors(tmp_path, module, is_transposed=True), fan_in_fan_out=True)
    assert_merged(tmp_path, {f"{module}.weight": 2.0 * product(tmp_path, module).t()}, groups)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"no_such": 1}, "no_such=1"),
        ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "base_model_name_or_path.*Download the base model"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(changes: dict[str, Any], told: str, home: Path) -> None:
    save_adapter(home, factors(home, Q0), **changes)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=told):
        read_model_config(home / "adapter")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: {**f, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)},
         "the base model has no model.layers.9.mlp.up_proj.weight"),
        (lambda f: {key: tensor for key, tensor in f.items() if "lora_B" not in key}, "lora_B.weight is missing"),
        (lambda f: {key: tensor for key, tensor in f.items() if "lora_A" not in key}, "has no lora_A beside it"),
        (lambda f: {key: tensor.flatten() for key, tensor in f.items()}, "do not fit"),
        (lambda f: {key: tensor[:0] if "_A" in key else tensor[:, :0].contiguous() for key, tensor in f.items()},
         "do not fit"),
        (lambda f: {key: tensor[:-1].contiguous() for key, tensor in f.items()}, "do not fit"),
        (lambda f: {**f, "base_model.model.model.no_such.weight": torch.zeros(1)}, "is not part of the base model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_base_model_is_named(change: Any, told: str, home: Path, groups: MedhaPGs) -> None:
    save_adapter(home, change(factors(home, Q0)))
    with pytest.raises(CheckpointError, match=told):
        parameters(home / "adapter", groups)


def test_a_pattern_that_is_no_name_is_refused(home: Path, groups: MedhaPGs) -> None:
    save_adapter(home, factors(home, Q0), alpha_pattern={"(.+)+x": 6})
    with pytest.raises(UnsupportedModelError, match="alpha_pattern"):
        parameters(home / "adapter", groups)


def test_an_adapter_without_weights_is_named(home: Path) -> None:
    (home / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: missing"):
        read_model_config(home / "adapter")
