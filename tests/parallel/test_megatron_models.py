"""Models of Megatron that are not Llama's, over layouts of real ranks, against Megatron's own forward."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.exact_hits.run import model_options
from megatron_medha.bits.bit_check import check_schedule
from megatron_medha.bits.play import Place
from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.core.errors import ConfigError, UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from tests.model.megatron_models import megatron_logits, megatron_model, recorded_args, save_megatron
from tests.model.test_megatron_exactness import MODELS
from tests.model.test_random_megatron_models import random_options
from tests.parallel.walk import LAYOUTS, VOCAB_SIZE, Reference, random_case, walk


@pytest.fixture(scope="module")
def pgs() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    return build_groups(ParallelLayout())


def saved(options: dict[str, Any], pgs: MedhaPGs, directory: Path) -> Reference:
    args = recorded_args("0.16.0", **options)
    model = megatron_model(args, pgs)
    save_megatron(model, args, directory)
    return lambda token_ids: megatron_logits(model, torch.tensor(token_ids)).numpy()


@pytest.mark.parametrize("layout", ["tp=2 spp=2 kvp=1", "tp=1 spp=1 kvp=2", "tp=2 spp=1 kvp=2"])
@pytest.mark.parametrize(
    "name",
    [
        "gpt", "nemotron", "interleaved partial", "no rope in every second layer", "sinks", "mixtral",
        "experts as in qwen2", "experts as in gpt-oss", "latent attention", "deepseek", "window",
        "window in two layers of four",
    ],
)  # fmt: skip
def test_every_layout_has_megatrons_logits_and_tokens(
    name: str, layout: str, ranks: RankProcesses, pgs: MedhaPGs, tmp_path: Path
) -> None:
    reference = saved(MODELS[name], pgs, tmp_path)
    outcome = walk(random_case(LAYOUTS[layout], 3, num_requests=3), ranks, tmp_path, reference)
    assert outcome.most_kvp_ranks == LAYOUTS[layout].kvp


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sinks", "window"])
def test_every_kind_of_attention_has_the_bits_of_one_rank_over_kvp(
    name: str, ranks: RankProcesses, pgs: MedhaPGs, tmp_path: Path
) -> None:
    saved(MODELS[name], pgs, tmp_path)
    place = Place(ranks, tmp_path, ParallelLayout(kvp=2), model_options("float32"))
    found = check_schedule(2, place, VOCAB_SIZE, names_operation=True)
    assert found.num_positions > 300 and not found.num_other, found.first


@pytest.mark.parametrize("seed", range(1000, 1000 + int(os.environ.get("MEDHA_RANDOM_MODELS", "4"))))
def test_a_random_model_at_a_random_layout_is_served_exactly(
    seed: int, ranks: RankProcesses, pgs: MedhaPGs, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    options = random_options(rng)
    try:
        reference = saved(options, pgs, tmp_path)
    except (AssertionError, ValueError):
        pytest.skip("Megatron does not build it")
    layout = LAYOUTS[rng.choice(sorted(LAYOUTS))]
    try:
        walk(random_case(layout, seed, num_requests=3), ranks, tmp_path, reference)
    except UnsupportedModelError as error:
        assert "fused kernel computes without it" in str(error)
    except ConfigError as error:
        assert f"parallel.tp={layout.tp} must divide" in str(error) or f"parallel.spp={layout.spp} must" in str(error)
