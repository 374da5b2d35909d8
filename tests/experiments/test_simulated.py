"""The questions to the simulator: their files, what is run again, what a search finds, and the page of the paper."""

from __future__ import annotations

import io
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from experiments.simulated import figures, measures, run
from experiments.simulated.figures import Answers, each_compared, picture_of, print_compared, value_of
from experiments.simulated.page import read_page, write_page
from experiments.simulated.question import Block, Cell, Compared, Figure, Question, Search, cells_of, names, read
from experiments.simulated.run import Runner, fingerprint, searched
from megatron_medha.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEARCH = Search(name="most", block=0, axis="load", labels=[1, 2, 4], figure="x", at_least=0.9, only={"size": [8]})
QUESTION = Question(
    question="?",
    axes={"load": {"1": ["a=1"], "2": ["a=2"], "4": ["a=4"]}, "size": [8]},
    blocks=[Block(cells="{load} of {size}", measure="layer")],
    searches=[SEARCH],
    name="one",
)


class FakeProcesses:
    """Answers at once."""

    def __init__(self, holds_below: float = 9.0) -> None:
        self.holds_below = holds_below
        self.asked: list[str] = []

    def submit(self, _: Any, cell: Cell) -> Future[dict[str, Any]]:
        self.asked.append(cell.name)
        done: Future[dict[str, Any]] = Future()
        done.set_result({"x": float(float(cell.name.split()[0]) < self.holds_below)})
        return done


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return Answers("one")


def runner(processes: FakeProcesses) -> Runner:
    return Runner(processes, tqdm(file=io.StringIO()))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", names())
def test_every_cell_of_a_question_is_a_run_of_medha_simulate(name: str) -> None:
    question = read(name)
    cells = list(cells_of(question)) + list(cells_of(question, "hour"))
    assert len({cell.name for cell in cells}) == len(cells)
    first = {(cell.measure, len(cell.words)): cell for cell in cells}
    for cell in first.values():
        assert callable(getattr(measures, cell.measure))
        measures.composed(cell.words)


def test_an_option_that_is_none_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match="scheduler.tile"):
        measures.composed(("scheduler.tile=8",))


@pytest.mark.parametrize("name", names())
def test_committed_results_answer_every_comparison_and_have_their_picture(name: str) -> None:
    question, answers = read(name), Answers(name)
    for one, _ in each_compared(question):
        assert value_of(one, answers) == value_of(one, answers), one.what  # a number
    if question.picture:
        assert picture_of(name).stat().st_size < 150_000


def test_the_committed_page_is_what_the_committed_results_give(tmp_path: Path) -> None:
    assert write_page(tmp_path).read_text() == (ROOT / "docs" / "paper.md").read_text()
    assert "not run yet" not in (tmp_path / "paper.md").read_text()


def test_every_row_and_picture_of_the_page_is_of_a_question() -> None:
    for section in read_page().sections:
        assert {row.question for row in section.rows} | set(section.pictures) <= set(names())


def test_a_label_adds_options_or_is_an_argument() -> None:
    first, *_ = cells_of(QUESTION)
    assert first == Cell("1 of 8", "layer", ("a=1",), {"size": 8})


def test_what_has_been_run_is_not_run_again_and_equal_cells_run_once(answers: Answers) -> None:
    answers.cells["1 of 8"] = {"x": 5.0}
    processes = FakeProcesses()
    runs = runner(processes)
    for cell in cells_of(QUESTION):
        runs.run(answers, cell)
    runs.run(Answers("two"), Cell("2 in another question", "layer", ("a=2",), {"size": 8}))

    assert processes.asked == ["2 of 8", "4 of 8"]
    assert json.loads(answers.path.read_text())["cells"]["1 of 8"] == {"x": 5.0}


@pytest.mark.parametrize(("holds_below", "bounds"), [(0.0, [0.0, 1.0]), (1.5, [1.0, 2.0]), (9.0, [2.0, 4.0])])
def test_a_search_finds_the_last_label_that_holds(answers: Answers, holds_below: float, bounds: list[float]) -> None:
    ((name, cells),) = searched(QUESTION, SEARCH)
    runner(FakeProcesses(holds_below)).search(answers, SEARCH, name, cells)
    assert answers.searches == {"most": {"8": bounds}}
    assert answers.at("most > 8 > 1") == bounds[1]


def test_figures_are_ratios_in_the_unit_they_are_shown_in(answers: Answers) -> None:
    answers.cells = {"a": {"s": 2.0}, "b": {"s": 8.0}}
    assert value_of(Figure(of="a > s", show="ms"), answers) == 2000
    assert value_of(Figure(of="a > s", over="b > s", less=True, show="%"), answers) == 75
    assert value_of(Figure(of="b > s", over="a > s", parts=4, show="%"), answers) == 100


@pytest.mark.parametrize(
    ("bars", "num_missed"), [({"low": 3}, 1), ({"high": 3}, 0), ({"published": 2.1, "within": 0.1}, 0)]
)
def test_a_missed_bar_counts(answers: Answers, bars: dict[str, Any], num_missed: int) -> None:
    answers.cells = {"a": {"s": 2.0}}
    question = Question(question="?", blocks=[], compared=[Compared(of="a > s", **bars)])
    assert print_compared(question, answers) == num_missed


def test_a_question_runs_again_when_it_or_the_simulator_changed(tmp_path: Path) -> None:
    for path in ("megatron_medha/core/x.py", "experiments/simulated/a.yaml", "experiments/simulated/b.yaml"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    first = fingerprint(tmp_path, "a")

    (tmp_path / "experiments/simulated/b.yaml").write_text("2")
    assert fingerprint(tmp_path, "a") == first
    (tmp_path / "megatron_medha/core/x.py").write_text("2")
    assert fingerprint(tmp_path, "a") != first


def test_the_folders_that_results_depend_on_hold_what_measures_import() -> None:
    text = (ROOT / "experiments" / "simulated" / "measures.py").read_text()
    imported = {line.split()[1].split(".")[1] for line in text.splitlines() if line.startswith("from megatron_medha.")}
    assert imported - {"compose", "simulate_config", "options", "config"} <= set(run.SOURCES)


def test_results_of_other_sources_are_gone_before_they_could_count_as_todays(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.cells = {"1 of 8": {"x": 1.0}, "of another part": {"x": 2.0}}
    answers.write()
    monkeypatch.setattr(run, "STATE", answers.path.parent / "state")
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        run.run_all([QUESTION], "", 1, is_fresh=False)
    assert Answers("one").cells == {"of another part": {"x": 2.0}}


MACHINE = ("model=llama3_8b", "hardware=h100_x16", "parallel.tp=8", "parallel.spp=2")
STREAM = ("workload.duration_s=20", "workload.long_share=0", "workload.qps=0.5", "seed=42")
SMALL: dict[str, dict[str, Any]] = {  # arguments with which a measure takes a moment
    "stream": {"has_bound": True, "deadlines": ("parallel.spp=1",)},
    "loads_alone": {},
    "lone_prefill": {"num_tokens": 8192, "chunks": [2048, 4096]},
    "ring_prefill": {"num_tokens": 8192, "tp": 1, "ring": {"overlaps": False}},
    "lone_decode": {"num_tokens": 8192},
    "chunks_and_a_decode": {"num_tokens": 8192, "chunk_tokens": 512, "every": 2},
    "prefill_beside_decodes": {"num_tokens": 8192, "num_decodes": 2},
    "attention_in_chunks": {"num_tokens": 8192, "chunk": 2048},
    "decode_beside_a_chunk": {"num_tokens": 8192, "chunk": 512},
    "decode_step": {"num_tokens": 8192, "batch": 2},
    "chunked_prefill": {"num_tokens": 8192, "chunk": 2048},
    "kv_capacity": {},
    "layer": {"num_tokens": 64},
    "collectives": {"mib": 1},
}


def test_every_measure_gives_positive_figures() -> None:
    assert {block.measure for name in names() for block in read(name).blocks} == set(SMALL)
    for name, arguments in SMALL.items():
        words = (*MACHINE, *STREAM) if name in ("stream", "loads_alone") else MACHINE
        values = run.measured(Cell(name, name, words, arguments))
        assert all(value >= 0 for value in values.values() if not isinstance(value, dict)), name
