"""Weights stored in 8 or 4 bits: the model of the floats they stand for, at any layout, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from tests.checkpoints.test_checkpoint_hf import make_checkpoint

CPU = torch.device("cpu")
BLOCK = 16
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "sparsity_config": {},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def by_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3, scales, and the floats they stand for."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales = torch.rand(rows, columns) * 0.01 + 1e-3
    spread = scales.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return *(stored := ((weight / spread).to(torch.float8_e4m3fn), scales)), stored[0].float() * spread


def by_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scales).to(torch.float8_e4m3fn)
    return stored, scales.bfloat16(), stored.float() * scales.bfloat16().float()


def as_a_whole(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stored = (weight / 0.01).to(torch.float8_e4m3fn)
    return stored, torch.tensor([0.01]), stored.float() * torch.tensor(0.01)


FORMS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], str, dict[str, Any]]] = {
    "blocks of DeepSeek": (by_blocks, "_scale_inv", DEEPSEEK),
    "blocks of compressed-tensors": (by_blocks, "_scale", compressed("block", block_structure=[BLOCK, BLOCK])),
    "outputs": (by_rows, "_scale", compressed("channel")),
    "whole tensors": (as_a_whole, "_scale", compressed("tensor")),
}


def quantise(directory: Path, form: str, change: Callable[[dict[str, Tensor]], None] = lambda _: None) -> None:
    """Replace the layers' matrices by quantised ones; what they stand for goes to directory/floats."""
    by, suffix, config = FORMS[form]
    tensors = load_file(directory / "model.safetensors")
    floats = dict(tensors)
    for key, weight in list(tensors.items()):
        if "proj" in key or ".experts." in key:
            tensors[key], tensors[key + suffix], floats[key] = by(weight)
    change(tensors)
    save(directory, tensors, quantization_config=config)
    (directory / "floats").mkdir()
    (directory / "floats" / "config.json").write_text((directory / "config.json").read_text())
    save(directory / "floats", floats, quantization_config=None)


def save(directory: Path, tensors: dict[str, Tensor], **fields: Any) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def parameters(directory: Path, groups: MedhaPGs) -> dict[str, Tensor]:
    config = read_model_config(directory)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    return dict(model.named_parameters())


@pytest.mark.parametrize("model", [{"model_type": "llama"}, {"model_type": "mixtral", **EXPERTS}])
@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_are_the_floats_they_stand_for(
    form: str, model: dict[str, Any], tmp_path: Path, groups: MedhaPGs
) -> None:
    make_checkpoint(tmp_path, **model)
    quantise(tmp_path, form)
    found, expected = parameters(tmp_path, groups), parameters(tmp_path / "floats", groups)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scales_of_activations_are_not_read(tmp_path: Path, groups: MedhaPGs) -> None:
    make_checkpoint(tmp_path, model_type="llama")
    key = "model.layers.0.mlp.up_proj.input_scale"
    quantise(tmp_path, "whole tensors", lambda tensors: tensors.update({key: torch.ones(1)}))
    parameters(tmp_path, groups)


def test_a_weight_without_its_scale_is_named(tmp_path: Path, groups: MedhaPGs) -> None:
    make_checkpoint(tmp_path, model_type="llama")
    key = "model.layers.1.mlp.up_proj.weight"
    quantise(tmp_path, "outputs", lambda tensors: tensors.__delitem__(key + "_scale"))
    with pytest.raises(CheckpointError, match=f"{key} has dtype F8_E4M3; weights must be floats"):
        parameters(tmp_path, groups)


def test_scales_of_another_shape_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, model_type="llama")
    key = "model.layers.1.mlp.up_proj.weight"
    quantise(tmp_path, "blocks of DeepSeek", lambda tensors: tensors.update({f"{key}_scale_inv": torch.ones(3, 3)}))
    with pytest.raises(CheckpointError, match=rf"{key}_scale_inv has shape \[3, 3\].*needs 24 scales"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quant_method": "awq"}, "quantization_config"),
        ({**DEEPSEEK, "fmt": "e5m2"}, "fmt='e5m2'"),
        ({**DEEPSEEK, "no_such": 1}, "no_such=1"),
        ({**DEEPSEEK, "weight_block_size": [128]}, "weight_block_size"),
        ({**compressed("channel"), "format": "pack-quantized"}, "format='pack-quantized'"),
        ({**compressed("channel"), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed("group"), "strategy='group'"),
        (compressed("channel", num_bits=4), "num_bits=4"),
    ],
)
def test_a_quantisation_that_is_not_undone_is_refused_by_name(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, model_type="llama")
    save(tmp_path, load_file(tmp_path / "model.safetensors"), quantization_config=changes)
    with pytest.raises(UnsupportedModelError, match=told):
        read_model_config(tmp_path)


GPT_OSS = {
    "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
    "sliding_window": 1 << 20,
}  # fmt: skip


def test_mxfp4_experts_are_those_of_transformers(tmp_path: Path, groups: MedhaPGs) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    make_checkpoint(tmp_path, **GPT_OSS)
    tensors = load_file(tmp_path / "model.safetensors")
    floats = dict(tensors)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, blocks.shape[:3], dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        floats[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    (tmp_path / "floats").mkdir()
    (tmp_path / "floats" / "config.json").write_text((tmp_path / "config.json").read_text())
    save(tmp_path / "floats", floats)
    save(tmp_path, tensors, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    found, expected = parameters(tmp_path, groups), parameters(tmp_path / "floats", groups)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
