"""What a report makes of run directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.cli.reports.report_runs import ReportRun, differing_keys, distinguishing_keys, find_runs, pareto
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

    assert [run.name for run in pareto(find_runs([tmp_path]), "short")] == ["0", "1"]


def run(name: str, ttft_s: float, tokens_per_s: float, is_simulated: bool = False, **options: object) -> ReportRun:
    values = {"classes": {"short": {"ttft_s": {"p99": ttft_s}}}, "all": {"tokens_per_s": tokens_per_s}}
    return ReportRun(name, Path(name), options, values, is_simulated)


def test_runs_that_are_equal_are_as_good_as_each_other() -> None:
    runs = [run("0", 1.0, 10.0), run("1", 2.0, 20.0), run("2", 1.0, 10.0), run("3", 1.0, 9.0)]
    assert [one.name for one in pareto(runs, "short")] == ["2", "0", "1"]


def test_measured_and_simulated_runs_do_not_compete() -> None:
    runs = [run("slow", 2.0, 10.0), run("sim", 1.0, 30.0, is_simulated=True), run("fast", 1.5, 20.0)]
    assert [one.name for one in pareto(runs, "short")] == ["fast", "sim"]


def test_an_option_that_another_one_settles_tells_nothing() -> None:
    runs = [
        run(f"{policy}{qps}", 1.0, 1.0, policy=policy, has_triage=policy == "lars", qps=qps)
        for policy in ("fcfs", "edf", "lars")
        for qps in (1.0, 2.0)
    ]
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
    assert printed == [tmp_path / "page" / "report.md", tmp_path / "page" / "report.html"]
    markdown, html = (path.read_text() for path in printed)
    assert "| 0 | fcfs | 1.00 s | 1.00 s |" in markdown and "| 1 | lars | 2.00 s | 2.00 s |" in markdown
    assert html.count("data:image/png;base64,") == 2
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
        write_run(tmp_path / "runs" / name, qps=1.0, ttft_s=1.0 + index, tokens_per_s=1.0 + index)
    assert main(["report", str(tmp_path / "runs"), f"out={tmp_path / 'page'}"]) == 0
    legend = figures[1].axes[0].get_legend()
    assert sorted(text.get_text() for text in legend.get_texts()) == [" _b", "c", "x\\$_{y\\$"]


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
