"""The experiment of one bit pattern: schedules on ranks that stay loaded, results that are kept, verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.one_bit_pattern.bit_digests import LoneRuns
from experiments.one_bit_pattern.schedules import Cell, KeptSchedules, kv_config, play_schedule, report
from experiments.one_bit_pattern.short_schedules import MAX_TOKENS, Vocabulary, conversations, short_schedule
from megatron_medha.bits.play import Place
from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.layout import ParallelLayout
from tests.parallel.walk import VOCAB_SIZE, Reference

VOCABULARY = Vocabulary(VOCAB_SIZE, 2, ())
SETTINGS = {"cell": "dense float32 lone"}
CELL = Cell("dense", "float32", "lone")


def line(seed: int, sha: str, num_other: int = 0) -> dict:
    return {
        "seed": seed, "num_positions": 100, "num_other": num_other, "first": "0.0, token 3", "counts": {"steps": 9},
        "shas": {f"{seed}.0": sha},
    }  # fmt: skip


def test_conversations_are_the_same_on_all_layouts_and_schedules_are_not() -> None:
    for seed in range(30):
        turns = conversations(seed, VOCABULARY)
        assert turns == conversations(seed, VOCABULARY)
        cases = [short_schedule(seed, layout, turns) for layout in (ParallelLayout(), ParallelLayout(kvp=2))]
        for case in cases:
            assert [(t.after, t.new_tokens, t.sampling) for t in case.turns] == [
                (t.after, t.new_tokens, t.sampling) for t in turns
            ]
            followed = {turn.after for turn in case.turns}
            assert not any(turn.request_id in followed for turn in case.turns if turn.abort_after is not None)
            assert case.shard_tokens <= MAX_TOKENS
        assert cases[0].scheduler != cases[1].scheduler or cases[0].turns != cases[1].turns


def test_a_line_that_was_cut_off_is_played_again(tmp_path: Path) -> None:
    kept = KeptSchedules(tmp_path, CELL, SETTINGS)
    kept.keep(line(0, "a"))
    kept.keep(line(1, "b"))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])
    again = KeptSchedules(tmp_path, CELL, SETTINGS)
    assert list(again.by_seed) == [0]
    again.keep(line(1, "b"))
    assert [json.loads(text) for text in path.read_text().splitlines()] == [SETTINGS, line(0, "a"), line(1, "b")]
    with pytest.raises(SystemExit, match="of other settings"):
        KeptSchedules(tmp_path, CELL, {"cell": "another"})


@pytest.mark.parametrize(
    ("other", "sha", "is_met"), [(0, "a", True), (1, "a", False), (0, "b", False)]
)
def test_other_bits_and_another_sha_miss_the_bar(
    other: int, sha: str, is_met: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [CELL, Cell("dense", "float32", "spp=2")]
    kept = {cell: KeptSchedules(tmp_path, cell, SETTINGS) for cell in cells}
    for cell, number, digest in ((cells[0], 0, "a"), (cells[1], other, sha)):
        for seed in range(150):
            kept[cell].keep(line(seed, digest, number if seed == 7 else 0))
    assert report(kept, [], 300) is is_met
    assert ("150 with more than one SHA" in capsys.readouterr().out) is (sha == "b")
    assert not report(kept, ["spp=2: not played"], 300)


def test_schedules_on_ranks_that_stay_loaded_have_the_bits_of_lone_runs(
    ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    options = ModelOptions(device="cpu", dtype="float32", block_size=16, num_threads=1)
    place = Place(ranks, model[0], ParallelLayout(), options, 16 << 20, kv_config())
    lone = LoneRuns(place)
    found = [play_schedule(seed, place, VOCABULARY, lone) for seed in (0, 1)]
    assert all(one["num_positions"] > 60 and not one["num_other"] for one in found), found
    assert len({sha for one in found for sha in one["shas"].values()}) == sum(len(one["shas"]) for one in found)
    assert ranks.num_batches > sum(one["counts"]["steps"] for one in found)  # nothing was loaded again
    pids = list(ranks.pids)
    assert play_schedule(0, place, VOCABULARY, lone) == found[0]
    assert ranks.pids == pids
