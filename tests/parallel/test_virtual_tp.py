"""With slices (model.virtual_tp) ranks of any tensor parallelism compute the bits of one rank: whole engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.exact_hits.run import model_options
from megatron_medha.bits.bit_check import check_schedule
from megatron_medha.bits.play import Place
from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.core.layout import ParallelLayout
from tests.parallel.walk import VOCAB_SIZE, save_model

FAMILIES = {
    "dense": {"family": "Llama"},
    "experts": {"family": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "one norm of all heads": {"family": "Olmo2"},
    "biases of q, k and v": {"family": "Qwen2"},
}
_made: dict[str, Path] = {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tmp_path_factory.mktemp("virtual_tp")


def num_other_bits(
    ranks: RankProcesses, directory: Path, family: str, layout: ParallelLayout, dtype: str, virtual_tp: str
) -> int:
    """Log-probabilities that differ from those of each sequence alone on one rank, in a random schedule."""
    if family not in _made:
        _made[family] = directory / family
        save_model(_made[family], num_key_value_heads=4, **FAMILIES[family])
    model = replace(model_options(dtype), virtual_tp=virtual_tp)
    place = Place(ranks, _made[family], layout, model)
    found = check_schedule(5, place, VOCAB_SIZE, names_operation=virtual_tp != "1")
    assert found.num_positions > 200
    assert not found.first or found.num_other
    return found.num_other


@pytest.mark.parametrize(
    ("family", "dtype", "tp", "spp"), [("dense", "float32", 4, 1), ("experts", "bfloat16", 2, 2)]
)
def test_no_log_probability_differs_in_a_bit(
    family: str, dtype: str, tp: int, spp: int, ranks: RankProcesses, directory: Path
) -> None:
    assert num_other_bits(ranks, directory, family, ParallelLayout(tp=tp, spp=spp), dtype, "4") == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tp", "spp"), [(2, 1), (4, 1), (2, 2)])
def test_no_log_probability_differs_in_a_bit_on_any_layout(
    family: str, dtype: str, tp: int, spp: int, ranks: RankProcesses, directory: Path
) -> None:
    assert num_other_bits(ranks, directory, family, ParallelLayout(tp=tp, spp=spp), dtype, "4") == 0


@pytest.mark.slow
def test_without_slices_some_do(ranks: RankProcesses, directory: Path) -> None:
    assert num_other_bits(ranks, directory, "dense", ParallelLayout(tp=4), "bfloat16", "1")
