"""What conf/ offers to simulations of clusters: chips, clusters, engines, models, and how true they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from megatron_medha.core.cost.capacity import MemoryBudget, num_kv_blocks
from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.options.compose import CONF_MODULE, option_names

CLUSTERS = [name for name in option_names("hardware") if "_x" in name]
MODELS = [name for name in option_names("model") if name != "auto"]
KIB = 1024


def read(group: str, name: str) -> Mapping[str, Any]:
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        composed = OmegaConf.to_container(compose(overrides=[f"+{group}={name}"]), resolve=True)
    assert isinstance(composed, dict)
    return composed[group]


@cache
def hardware(name: str) -> Hardware:
    return msgspec.convert(read("hardware", name), Hardware)


@cache
def engine(name: str) -> EngineCosts:
    return msgspec.convert(read("engine", name), EngineCosts)


@cache
def model(name: str) -> ModelShape:
    return msgspec.convert(read("model", name)["shape"], ModelShape)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_so_many_of_its_chip(name: str) -> None:
    chip, _, count = name.partition("_x")
    cluster = hardware(name)
    assert cluster.name == name
    assert cluster.num_devices == int(count)
    assert cluster.devices_per_node == 8
    alone = hardware(chip)
    for field in ("flops_per_s", "memory_bytes_per_s", "memory_bytes", "intra_node", "inter_node", "linear_efficiency"):
        assert getattr(cluster, field) == getattr(alone, field)


@pytest.mark.parametrize("name", option_names("engine"))
def test_every_engine_is_named_as_its_option(name: str) -> None:
    assert engine(name).name == name


@pytest.mark.parametrize(
    ("name", "billions", "active_billions"),
    [
        ("llama3_8b", 8.03, 7.5), ("llama3_70b", 70.55, 69.5), ("llama3_405b", 405.9, 403.7), ("qwen3_8b", 8.19, 7.57),
        ("qwen3_32b", 32.76, 31.98), ("qwen3_30b_a3b", 30.5, 3.04), ("qwen3_235b_a22b", 235.1, 21.57),
        ("mixtral_8x7b", 46.7, 12.75), ("mixtral_8x22b", 140.6, 38.96),
    ],
)  # fmt: skip
def test_models_have_as_many_parameters_as_published(name: str, billions: float, active_billions: float) -> None:
    # Active ones without the embedding, which published figures (3.3, 22, 12.9 and 39 billion) include.
    shape = model(name)
    assert shape.num_params / 1e9 == pytest.approx(billions, rel=0.002)
    assert shape.num_active_params / 1e9 == pytest.approx(active_billions, rel=0.002)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_fits_two_nodes_and_takes_longer_for_more(name: str) -> None:
    shape, cluster = model(name), hardware("h100_x16")
    layout = ParallelLayout(tp=min(8, shape.num_kv_heads), spp=2)
    assert num_kv_blocks(shape, cluster, layout, MemoryBudget(), num_tokens=40_000) > 0
    cost = ClusterCost(shape=shape, hardware=cluster, engine=engine("medha"), layout=layout)
    assert 0.0 < cost.linear_s(1, 1) < cost.linear_s(4096, 1) < 10.0


def test_one_set_of_constants_tells_published_prefills_of_vllm_at_every_length() -> None:
    # Llama-3 8B, TP8 PP2, chunks of 512, 16 A100: seconds to the first token, as in
    # experiments/simulated/published_ttft.yaml.
    published_s = {
        1: 0.084, 4: 0.300, 8: 0.557, 16: 1.11, 32: 2.34, 64: 4.74, 128: 11.6, 256: 35.7, 512: 130, 768: 288, 1024: 501,
    }  # fmt: skip
    cost = ClusterCost(
        shape=model("llama3_8b_1m"), hardware=hardware("a100_x16"), engine=engine("vllm_v0"),
        layout=ParallelLayout(tp=8, spp=2),
    )  # fmt: skip
    total_s = cost.engine.request_s
    for start in range(0, 1024 * KIB, 512):
        load = StepLoad()
        load.add_chunk(start, 512, cost.attention_s(start, 512))
        total_s += cost.step_s(load)
        if (start + 512) % KIB == 0 and (length := (start + 512) // KIB) in published_s:
            assert total_s == pytest.approx(published_s[length], rel=0.15), f"{length}K"
