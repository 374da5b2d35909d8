"""What `make paper` takes for done, how long it says is left, and the page it writes."""

from __future__ import annotations

from pathlib import Path

from experiments.paper.page import write_page
from experiments.paper.rows import SECTIONS
from experiments.paper.run import HEADLINE, OTHERS
from experiments.paper.schedule import Task, eta_s
from experiments.paper.sources import fingerprint

ROOT = Path(__file__).parents[2]


def test_every_row_names_an_experiment_that_the_command_runs() -> None:
    named = {row.experiment for section in SECTIONS for row in section.rows}
    assert named <= {task.name for task in (HEADLINE, *OTHERS)}


def test_the_committed_page_is_what_the_committed_results_give(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "docs").mkdir()

    assert write_page(tmp_path).read_text() == (ROOT / "docs" / "paper.md").read_text()


def test_pictures_of_the_page_are_there_and_small() -> None:
    for section in SECTIONS:
        for _, path in section.pictures:
            assert (ROOT / "experiments" / path).stat().st_size < 150_000, path


def test_an_experiment_runs_again_when_its_code_or_that_of_the_simulator_changed(tmp_path: Path) -> None:
    for folder in ("megatron_medha/core", "experiments/a", "experiments/b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("1")
    task = Task("a", 1.0)
    first = fingerprint(tmp_path, task)

    (tmp_path / "experiments/b/x.py").write_text("2")
    assert fingerprint(tmp_path, task) == first
    assert fingerprint(tmp_path, Task("a", 1.0, needs=("b",))) != first

    (tmp_path / "megatron_medha/core/x.py").write_text("2")
    assert fingerprint(tmp_path, task) != first


def test_the_time_left_is_that_of_the_process_which_ends_last() -> None:
    assert eta_s([(Task("a", 10.0), 4.0)], [Task("b", 5.0), Task("c", 2.0)], num_jobs=2) == 7.0  # b, then c
    assert eta_s([(Task("headline", 100.0), 10.0)], [Task("b", 6.0)], num_jobs=2) == 46.0
    assert eta_s([(Task("a", 1.0), 9.0)], [], num_jobs=2) == 0.0
