"""What `medha plan out=` leaves: figures for programs, a page and a picture for people, and the line to serve with."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.serve_options import ServeOptions

SMALL = ("plan", "hardware=a100_x8", "hardware.num_devices=2", "max_kvp=1", "max_dp=2", "num_processes=1")
CHATS = ("workload=medha_mix_00pct", "workload.output_scale=0.02", "trial_s=20", "scheduler.step_budget_s=0.04",
         "slo.attainment=0.8")  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for a load that one GPU carries, and one that takes two."""
    out = tmp_path_factory.mktemp("plan") / "out"
    assert main([*SMALL, *CHATS, "workload.qps=1.5,3", "gpu_usd_per_h=3.6", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def loads(written: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((written / "plan.json").read_text())["loads"]
    return found


def test_every_load_has_its_fewest_gpus_and_what_they_cost(loads: list[dict[str, Any]]) -> None:
    assert [(load["qps"], load["best"]["gpus"]) for load in loads] == [(1.5, 1), (3.0, 2)]
    for load in loads:
        requests = load["requests"]
        num_requests = sum(requests["by_class"].values())
        usd = load["best"]["gpus"] * 3.6 / 3600 / load["qps"] * num_requests
        assert load["best"]["usd_per_million_output_tokens"] == pytest.approx(1e6 * usd / requests["output_tokens"])
        share = load["best"]["attainment"]["short"]
        assert share["low"] <= share["share"] <= share["high"] and share["share"] >= 0.8


def test_what_ended_early_is_run_to_its_end_for_the_curve_and_misses_the_slo(loads: list[dict[str, Any]]) -> None:
    one, two = loads[1]["gpus_and_attainment"]
    assert (one["gpus"], one["passes"], two["gpus"], two["passes"]) == (1, False, 2, True)
    assert one["attainment"]["all"]["share"] < 0.8 <= two["attainment"]["all"]["share"]


def test_the_line_to_serve_with_is_one_that_the_server_takes(loads: list[dict[str, Any]]) -> None:
    words = shlex.split(loads[1]["serve"])
    assert words[:3] == ["medha", "serve", "checkpoint=DIR"] and "scheduler=lars" in words
    options = freeze(compose("serve", ServeOptions, words[3:]), ServeOptions)
    best = loads[1]["best"]
    assert [getattr(options.parallel, name) for name in ("tp", "spp", "kvp", "dp")] == [
        best[name] for name in ("tp", "spp", "kvp", "dp")
    ]
    assert options.scheduler.step_budget_s == 0.04


def test_the_csv_has_a_row_for_each_candidate_under_each_load(written: Path, loads: list[dict[str, Any]]) -> None:
    rows = list(csv.DictReader((written / "plan.csv").read_text().splitlines()))
    assert len(rows) == sum(len(load["candidates"]) for load in loads)
    failed = [row for row in rows if row["qps"] == "3.0" and row["gpus"] == "1"]
    assert [row["passes"] for row in failed] == ["False"]
    assert float(failed[0]["all.attainment"]) < 0.8 and "had missed the SLO" in failed[0]["why"]


def test_the_page_holds_its_picture_and_asks_nobody_for_anything(written: Path, loads: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    page = (written / "plan.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 1 and "http" not in page and "<script" not in page
    assert all(load["serve"] in page for load in loads)
    assert (written / "plan.svg").stat().st_size and (written / "plan.pdf").read_bytes().startswith(b"%PDF")


def test_where_no_load_is_small_enough_the_files_say_what_the_longest_prompt_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *CHATS, "workload.qps=2", "slo.ttft_s=0.01", f"out={tmp_path}"]) == 1
    (load,) = json.loads((tmp_path / "plan.json").read_text())["loads"]
    assert load["best"] is None and "however small the load" in load["why_none"]
    layouts = {(one["tp"], one["spp"]) for one in load["longest_prompt_alone"]}
    assert layouts == {(1, 1), (1, 2), (2, 1)}
    assert all(one["ttft_s"] > 0.01 and one["why_not"] for one in load["longest_prompt_alone"])
    assert "however small the load" in (tmp_path / "plan.html").read_text()


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (("workload.qps=1,1",), "name each load once"),
        (("workload.qps=1,x",), "workload.qps=x"),
        (("find=capacity", "workload.qps=1,2"), "find=capacity finds the load itself"),
        (("find=capacity", "workload.qps=1", "out=there"), "takes no out=there"),
        (("workload.qps=1", "out=/proc/nowhere"), "out=/proc/nowhere: cannot be written"),
    ],
)
def test_what_cannot_be_planned_or_written_is_refused_before_the_search(
    words: tuple[str, ...], way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *CHATS, *words]) == 2
    captured = capsys.readouterr()
    assert way_out in captured.err and "candidates" not in captured.out
