"""What a report makes of run directories."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.cli.reports.report_groups import capacity, group_keys, group_runs, load_curves, load_key, pareto
from megatron_medha.cli.reports.report_runs import ReportRun, differing_keys, distinguishing_keys, find_runs
from megatron_medha.core.errors import ConfigError


def latencies(ttft_s: float | None) -> dict[str, Any]:
    same = {"p50": ttft_s, "p90": ttft_s, "p99": ttft_s}
    return {"ttft_s": same, "tpot_s": same}


def write_run(path: Path, *, qps: float, ttft_s: float | None, tokens_per_s: float, policy: str = "lars") -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"seed: 0\nworkload:\n  qps: {qps}\nscheduler:\n  policy: {policy}\n")
    values = {
        "classes": {"short": latencies(ttft_s)},
        "all": {"attainment": 0.5, "goodput_per_s": 1.0, "tokens_per_s": tokens_per_s},
    }
    (path / "summary.json").write_text(json.dumps(values))


def test_runs_of_a_sweep_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        write_run(tmp_path / str(number), qps=float(number), ttft_s=1.0, tokens_per_s=1.0)

    assert [run.name for run in find_runs([tmp_path])] == ["0", "2", "10"]


def test_a_run_named_twice_is_reported_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "0", qps=1.0, ttft_s=1.0, tokens_per_s=1.0)

    assert len(find_runs([tmp_path, tmp_path / "a"])) == 1


def test_columns_are_the_options_that_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "0", qps=1.0, ttft_s=1.0, tokens_per_s=1.0)
    write_run(tmp_path / "1", qps=2.0, ttft_s=1.0, tokens_per_s=1.0)

    assert differing_keys(find_runs([tmp_path])) == ["workload.qps"]


def test_the_pareto_front_is_what_no_other_run_beats_in_both(tmp_path: Path) -> None:
    for name, ttft_s, tokens_per_s in (("0", 1.0, 10.0), ("1", 2.0, 30.0), ("2", 2.5, 20.0), ("3", None, 40.0)):
        write_run(tmp_path / name, qps=float(name), ttft_s=ttft_s, tokens_per_s=tokens_per_s)

    assert [run.name for run in pareto(group_runs(find_runs([tmp_path])), "short")] == ["0", "1"]


def run(name: str, ttft_s: float, tokens_per_s: float, is_simulated: bool = False, **options: object) -> ReportRun:
    values = {"classes": {"short": {"ttft_s": {"p99": ttft_s}}}, "all": {"tokens_per_s": tokens_per_s}}
    return ReportRun(name, Path(name), {"name": name, **options}, values, is_simulated)


def test_runs_that_are_equal_are_as_good_as_each_other() -> None:
    runs = [run("0", 1.0, 10.0), run("1", 2.0, 20.0), run("2", 1.0, 10.0), run("3", 1.0, 9.0)]
    assert [one.name for one in pareto(group_runs(runs), "short")] == ["2", "0", "1"]


def test_measured_and_simulated_runs_do_not_compete() -> None:
    runs = [run("slow", 2.0, 10.0), run("sim", 1.0, 30.0, is_simulated=True), run("fast", 1.5, 20.0)]
    assert [one.name for one in pareto(group_runs(runs), "short")] == ["fast", "sim"]


def test_an_option_that_another_one_settles_tells_nothing() -> None:
    runs = [
        run(f"{policy}{qps}", 1.0, 1.0, policy=policy, has_triage=policy == "lars", qps=qps)
        for policy in ("fcfs", "edf", "lars")
        for qps in (1.0, 2.0)
    ]
    runs = [replace(one, options={key: value for key, value in one.options.items() if key != "name"}) for one in runs]
    assert differing_keys(runs) == ["policy", "has_triage", "qps"]
    assert distinguishing_keys(runs) == ["policy", "qps"]


def test_a_report_has_a_row_per_run_and_a_page_that_needs_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for number, policy in enumerate(("fcfs", "lars")):
        write_run(tmp_path / "runs" / str(number), qps=1.0, ttft_s=1.0 + number, tokens_per_s=1.0, policy=policy)

    assert main(["report", str(tmp_path / "runs"), f"out={tmp_path / 'page'}"]) == 0

    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [tmp_path / "page" / f"report.{kind}" for kind in ("md", "html", "csv", "tex")]
    markdown, html = (path.read_text() for path in printed[:2])
    assert "| 0 | fcfs | 50.0% | 1.000 | 1.000 | - | 1.00 s | 1.00 s |" in markdown
    assert "| 1 | lars | 50.0% | 1.000 | 1.000 | - | 2.00 s | 2.00 s |" in markdown
    assert html.count("data:image/svg+xml;base64,") == 2
    assert "src=\"http" not in html and "src=\"report" not in html


def test_tables_and_pictures_call_a_run_by_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    for number, policy in ((0, "fcfs"), (1, "lars"), (7, "srpt")):
        path = tmp_path / "runs" / str(number)
        write_run(path, qps=1.0, ttft_s=1.0 + number, tokens_per_s=1.0 + number, policy=policy)
    assert main(["report", str(tmp_path / "runs"), f"out={tmp_path / 'page'}"]) == 0
    (bars,), (pareto_axes,) = (figure.axes for figure in figures)
    named = ["0: policy=fcfs", "1: policy=lars", "7: policy=srpt"]
    assert [text.get_text() for text in bars.get_yticklabels()] == named
    assert [text.get_text() for text in pareto_axes.texts] == ["0", "1", "7"]
    assert [text.get_text() for text in pareto_axes.get_legend().get_texts()] == named


def test_names_with_dollars_or_underscores_are_in_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    for index, name in enumerate(("x$_{y$", "_b", "c")):
        write_run(tmp_path / "runs" / name, qps=1.0, ttft_s=1.0 + index, tokens_per_s=1.0 + index, policy=f"p{index}")
    assert main(["report", str(tmp_path / "runs"), f"out={tmp_path / 'page'}"]) == 0
    legend = figures[1].axes[0].get_legend()
    texts = sorted(text.get_text() for text in legend.get_texts())
    assert texts == [" _b: policy=p1", "c: policy=p2", "x\\$_{y\\$: policy=p0"]


def test_a_line_in_a_name_ends_no_cell_of_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a|b", qps=1.0, ttft_s=1.0, tokens_per_s=1.0)
    assert main(["report", str(tmp_path)]) == 0
    assert "| a\\|b |" in (tmp_path / "report.md").read_text()


def test_a_directory_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")

    assert main(["report", str(tmp_path)]) == 2
    assert "no finished run in there" in capsys.readouterr().err


def test_a_summary_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[]")

    with pytest.raises(ConfigError, match="not a run directory of this version"):
        find_runs([tmp_path])


def sweep(tmp_path: Path, attainment: Mapping[tuple[str, float], float], num_seeds: int = 3) -> Path:
    """A job for each policy, load and seed; figures grow with the seed."""
    number = 0
    for (policy, qps), share in attainment.items():
        for seed in range(num_seeds):
            path = tmp_path / "sweep" / str(number)
            write_run(path, qps=qps, ttft_s=qps + 0.1 * seed, tokens_per_s=100.0 * qps, policy=policy)
            text = (path / "config.yaml").read_text().replace("seed: 0", f"seed: {seed}")
            (path / "config.yaml").write_text(text + "slo:\n  attainment: 0.9\n  ttft_s: 2.0\n")
            values = json.loads((path / "summary.json").read_text())
            values["all"]["attainment"] = values["classes"]["short"]["attainment"] = share - 0.01 + 0.01 * seed
            (path / "summary.json").write_text(json.dumps(values))
            number += 1
    return tmp_path / "sweep"


FALLING = {("fcfs", 1.0): 0.98, ("fcfs", 2.0): 0.94, ("fcfs", 4.0): 0.54,
           ("lars", 1.0): 0.98, ("lars", 2.0): 0.98, ("lars", 4.0): 0.98}  # fmt: skip


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_mean_and_interval(tmp_path: Path) -> None:
    groups = group_runs(find_runs([sweep(tmp_path, FALLING)]))

    assert [group.name for group in groups] == [f"{first}, {first + 1}, {first + 2}" for first in range(0, 18, 3)]
    assert group_keys(groups) == ["workload.qps", "scheduler.policy"]
    spread = groups[0].class_figure("short", "ttft_s", "p99")
    assert spread is not None and spread.num == 3
    assert (spread.mean, spread.low, spread.high) == pytest.approx((1.1, 1.0, 1.2))


def test_a_run_that_repeats_another_to_the_last_figure_counts_once(tmp_path: Path) -> None:
    for number, ttft_s in enumerate((1.0, 1.0, 2.5)):
        write_run(tmp_path / str(number), qps=1.0, ttft_s=ttft_s, tokens_per_s=1.0)
    (group,) = group_runs(find_runs([tmp_path]))
    spread = group.class_figure("short", "ttft_s", "p99")

    assert group.name == "0, 1, 2"
    assert spread is not None and (spread.num, spread.mean) == (2, 1.75)


def test_load_is_drawn_as_a_curve_for_each_policy_and_the_capacity_is_where_it_crosses(tmp_path: Path) -> None:
    groups = group_runs(find_runs([sweep(tmp_path, FALLING)]))
    key = load_key(groups)
    assert key == "workload.qps"
    fcfs, lars = load_curves(groups, key)

    assert [curve.options["scheduler.policy"] for curve in (fcfs, lars)] == ["fcfs", "lars"]
    assert [load for load, _ in fcfs.points] == [1.0, 2.0, 4.0]
    crossing, beyond, below = capacity(fcfs, 0.9), capacity(lars, 0.9), capacity(lars, 0.99)
    assert crossing is not None and beyond is not None and below is not None
    assert crossing.load == pytest.approx(2.2) and crossing.sign == ""  # a tenth of the way from 94% to 54%
    assert (beyond.load, beyond.sign) == (4.0, ">")
    assert (below.load, below.sign) == (1.0, "<")


def test_the_report_of_a_sweep_over_load_has_curves_csv_and_latex(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["report", str(sweep(tmp_path, FALLING)), f"out={out}"]) == 0

    svg = (out / "report_load.svg").read_text()
    assert svg.startswith("<?xml") and (out / "report_load.pdf").read_bytes().startswith(b"%PDF")
    assert not (out / "report_pareto.svg").exists()  # at little load any policy is fast: loads do not compete
    markdown = (out / "report.md").read_text()
    assert "| fcfs | 2.2 |" in markdown and "| lars | > 4 |" in markdown
    assert "1.10 s (1.00 to 1.20 s)" in markdown
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert len(rows) == 18 and {row["scheduler.policy"] for row in rows} == {"fcfs", "lars"}
    assert float(rows[1]["short.ttft_s.p99"]) == pytest.approx(1.1) and rows[1]["seed"] == "1"
    latex = (out / "report.tex").read_text()
    lines = [line for line in latex.splitlines() if line.endswith("\\\\")]
    assert len({line.count("&") for line in lines if "multicolumn" not in line}) == 1
    assert re.search(r"(?<!\\)[%_#$]", latex.split(r"\midrule")[1]) is None


def test_the_same_runs_give_the_same_report_to_the_last_byte(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    directory = sweep(tmp_path, FALLING)
    for name in ("a", "b"):
        assert main(["report", str(directory), f"out={tmp_path / name}"]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_curves_can_be_drawn_over_another_option_and_only_over_one_that_varies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = group_runs(find_runs([sweep(tmp_path, FALLING)]))
    assert load_key(groups, "slo.ttft_s") is None
    assert main(["report", str(tmp_path / "sweep"), "x=slo.ttft_s"]) == 2
    assert "x=slo.ttft_s: not an option with several numbers" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "sweep"), "x=workload.qps", f"out={tmp_path / 'out'}"]) == 0


def test_without_matplotlib_there_is_the_table_and_a_line_says_why_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    out = tmp_path / "out"
    assert main(["report", str(sweep(tmp_path, FALLING)), f"out={out}"]) == 0

    assert sorted(path.name for path in out.iterdir()) == ["report.csv", "report.html", "report.md", "report.tex"]
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert "| fcfs | 2.2 |" in (out / "report.md").read_text()


def test_what_is_named_in_a_run_is_no_markup_of_the_page(tmp_path: Path) -> None:
    for number, policy in enumerate(("'<script>alert(1)</script>'", "'a|b & c'")):
        write_run(tmp_path / str(number), qps=1.0, ttft_s=1.0, tokens_per_s=1.0, policy=policy)
    assert main(["report", str(tmp_path)]) == 0
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert "a\\|b & c" in (tmp_path / "report.md").read_text() and "a|b \\& c" in (tmp_path / "report.tex").read_text()
