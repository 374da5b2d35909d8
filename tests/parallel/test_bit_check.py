"""`medha check-bits` finds the same bits where they are, and names the operation where they are not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from experiments.exact_hits.run import model_options
from megatron_medha.bits.bit_check import check_schedule
from megatron_medha.bits.lone_run import differences, lone_run, sequences_of
from megatron_medha.bits.operation_trace import first_difference, record_operations
from megatron_medha.bits.play import Place, Play
from megatron_medha.bits.random_schedule import random_case
from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.cli.medha import main
from megatron_medha.core.layout import ParallelLayout
from tests.parallel.walk import VOCAB_SIZE, Reference

if TYPE_CHECKING:
    from megatron_medha.worker.rank import Rank


@pytest.mark.slow  # two layouts, each loaded for its schedule and for the lone runs
def test_a_schedule_is_played_once_and_has_the_bits_of_lone_runs(
    ranks: RankProcesses, model: tuple[Path, Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.jsonl"
    words = ["check-bits", str(model[0]), f"file={file}", "tp=[1]", "kvp=[1]", "schedules=1", "kv_gib=0.1"]
    assert main([*words, "spp=[1,2]"]) == 0
    assert "the same bits everywhere" in capsys.readouterr().out
    kept = file.read_text()
    results = [json.loads(line) for line in kept.splitlines()[1:]]
    assert [one["layout"] for one in results] == ["tp=1 spp=1 kvp=1", "tp=1 spp=2 kvp=1"]
    assert all(one["num_positions"] > 300 for one in results)
    file.write_text(kept.replace('"num_other": 0', '"num_other": 7', 1))
    assert main([*words, "spp=[1]"]) == 1  # what stands there is not played again
    assert "bits differ on 1 of 1 layouts" in capsys.readouterr().out
    assert main([*words, "spp=[1]", "model.num_threads=2"]) == 2
    assert "results of other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (ParallelLayout(kvp=2), "float32"),
        (ParallelLayout(spp=2, kvp=2), "bfloat16"),
        pytest.param(ParallelLayout(kvp=4), "bfloat16", marks=pytest.mark.slow),
    ],
    ids=["kvp=2 float32", "spp=2 kvp=2 bfloat16", "kvp=4 bfloat16"],
)
def test_requests_whose_kv_lies_on_several_ranks_have_the_bits_of_one_rank(
    layout: ParallelLayout, dtype: str, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    place = Place(ranks, model[0], layout, model_options(dtype))
    found = check_schedule(1, place, VOCAB_SIZE, names_operation=True)
    assert found.num_positions > 300 and not found.num_other, found.first


def test_where_no_layout_can_be_played_no_bits_are_said_to_be_the_same(
    model: tuple[Path, Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model[0]), f"file={tmp_path / 'found.jsonl'}", "tp=[3]", "spp=[1]", "kvp=[1]", "schedules=1"]
    assert main(["check-bits", *words]) == 2
    printed = capsys.readouterr().out
    assert "nothing was played" in printed and "the same bits" not in printed


def _disturbed(rank: Rank, notes: dict[str, float], request_id: str) -> None:
    """One layer's norm gives a last bit more in every step of a few tokens."""
    layer = rank.model.decoder.layers[1]
    layer.pre_mlp_layernorm.register_forward_hook(lambda _, args, out: out * 1.000001 if out.shape[0] < 10 else out)
    record_operations(rank, notes, request_id)


def test_the_first_operation_that_differs_is_named(ranks: RankProcesses, model: tuple[Path, Reference]) -> None:
    place = Place(ranks, model[0], ParallelLayout(), model_options("float32"))
    case = random_case(3, vocab_size=VOCAB_SIZE, num_turns=4)
    play = Play(case, place, has_cache=True, prepare=partial(_disturbed, request_id="r0")).run()
    sequences = sequences_of(play)
    lone = lone_run(sequences, place, case.kv, partial(record_operations, request_id="r0"))
    num_positions, num_other, found = differences(play, lone)
    assert 0 < num_other <= num_positions and found
    last = len(sequences["r0"]) - 1
    assert first_difference(play.notes, lone.notes, last).startswith("layer 0002 pre_mlp_layernorm at position")
    assert not first_difference(lone.notes, lone.notes, last)
