"""Tensors of Megatron's checkpoints under every name they may have: by layer or stacked, of either spec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from tests.model.megatron_models import megatron_model, recorded_args, save_megatron, with_engines_names
from tests.model.test_megatron_exactness import MODELS

CPU = torch.device("cpu")
NAMINGS = {
    "stacked": {}, "by layer": {"non_homogeneous_layers": True}, "singletons": {"singleton_local_shards": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def pgs() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


@pytest.mark.parametrize("is_engines", [False, True])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ["gpt", "mixtral", "experts as in qwen2", "latent attention", "deepseek", "sinks"])
def test_weights_are_the_same_under_every_name(
    name: str, naming: str, is_engines: bool, pgs: MedhaPGs, tmp_path: Path
) -> None:
    args = recorded_args("0.16.0", **MODELS[name])
    theirs = megatron_model(args, pgs)
    rename = {"renamed": with_engines_names(args)} if is_engines else {}
    save_megatron(theirs, args, tmp_path, NAMINGS[naming], **rename)
    config = read_model_config(tmp_path)
    ours = build_model(config, dtype=torch.float32, device=CPU, pgs=pgs, is_initialized=False)
    load_weights(ours, config, tmp_path, lambda what, fraction: None)
    found = dict([*ours.named_parameters(), *ours.named_buffers()])
    for key, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if not key.endswith(("inv_freq", "local_tokens_per_expert", "cos_cached", "sin_cached")):
            assert torch.equal(found[key], tensor), key
