"""Questions to the simulator, one YAML file each beside this one: runs their cells, prints figures beside bars.

    python -m experiments.simulated.run --list                  # the questions
    python -m experiments.simulated.run kvp_tpot                # one of them
    python -m experiments.simulated.run headline --jobs 2       # cells in two processes
    python -m experiments.simulated.run headline --part hour    # cells that take long, left out without --part
    python -m experiments.simulated.run headline --report       # tables and picture of what has run already
    make paper                                                  # all of them, two at a time, and docs/paper.md

Figures go to results/NAME.json after every cell and the picture to results/NAME.png. What has run with the sources as
they are is not run again; a run that was broken off goes on where it was. `medha compile` before makes it faster.
Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

from megatron_medha.system.compiled_core import use_compiled_core

use_compiled_core()  # in the processes of a run too: each imports this file

from experiments.simulated import measures
from experiments.simulated.draw import draw
from experiments.simulated.figures import Answers, at_path, print_compared, print_tables
from experiments.simulated.page import write_page
from experiments.simulated.question import HERE, Cell, Question, Search, cells_of, names, read, searched

ROOT = Path(__file__).parents[2]
STATE = ROOT / "multirun" / "simulated"  # by question and part, the sources that its results are of
SOURCES = ("core", "engine", "sim", "stats", "workload")  # folders of the package that results depend on


def measured(cell: Cell) -> dict[str, Any]:
    """The figures of a cell."""
    values: dict[str, Any] = getattr(measures, cell.measure)(cell.words, **cell.arguments)
    return values


class Runner:
    """Runs cells in processes; equal ones of several questions once."""

    def __init__(self, processes: ProcessPoolExecutor, bar: Any) -> None:
        self._processes, self._bar = processes, bar
        self._futures: dict[str, Future[dict[str, Any]]] = {}
        self._lock = Lock()

    def run(self, answers: Answers, cell: Cell) -> dict[str, Any]:
        """A cell's figures, from the answers if they have them."""
        if cell.name not in answers.cells:
            with self._lock:
                if cell.key not in self._futures:
                    self._futures[cell.key] = self._processes.submit(measured, cell)
            values = self._futures[cell.key].result()
            with self._lock:
                answers.cells[cell.name] = values
                answers.write()
        with self._lock:
            self._bar.update()
            self._bar.set_postfix_str(f"{answers.path.stem}: {cell.name}")
        return answers.cells[cell.name]

    def search(self, answers: Answers, search: Search, name: str, cells: list[Cell]) -> None:
        """Bisect; below the first label it holds for certain, at the last it does not."""
        low, high = 0, len(cells)
        while high - low > 1:
            middle = (low + high) // 2
            value = at_path(self.run(answers, cells[middle - 1]), search.figure)
            low, high = (middle, high) if value >= search.at_least else (low, middle)
        bounds = [0.0, *map(float, search.labels)]
        with self._lock:
            answers.searches.setdefault(search.name, {})[name] = [bounds[low], bounds[high]]
            answers.write()


def run_all(questions: list[Question], part: str, num_jobs: int, *, is_fresh: bool) -> None:
    """Run what is missing."""
    plans: list[tuple[Question, Answers, list[Cell]]] = []
    for question in questions:
        answers, cells = Answers(question.name), list(cells_of(question, part))
        state, sources = STATE / f"{question.name}{part}.txt", fingerprint(ROOT, question.name)
        if is_fresh or not state.exists() or state.read_text() != sources:
            # Those of other parts stay: they take long, and are asked for by name.
            for cell in _all_cells(question, part):
                answers.cells.pop(cell.name, None)
            answers.write()  # before they count as today's
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(sources)
        plans.append((question, answers, cells))
    with (
        ProcessPoolExecutor(num_jobs, mp_context=get_context("spawn")) as processes,
        ThreadPoolExecutor(num_jobs + 1) as threads,
        tqdm(total=sum(len(cells) for _, _, cells in plans), unit="cell", smoothing=0.0) as bar,
    ):
        runner = Runner(processes, bar)
        waiting: list[Future[Any]] = []
        for question, answers, cells in plans:
            waiting += [threads.submit(runner.run, answers, cell) for cell in cells]
            for search in question.searches if not part else ():
                for name, found in searched(question, search):
                    bar.total += (len(found) - 1).bit_length()
                    waiting.append(threads.submit(runner.search, answers, search, name, found))
        try:
            for one in waiting:
                one.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            processes.shutdown(wait=False, cancel_futures=True)
            raise


def _all_cells(question: Question, part: str) -> list[Cell]:
    """Of a part, those of its searches included."""
    cells = list(cells_of(question, part))
    for search in question.searches if not part else ():
        cells += [cell for _, found in searched(question, search) for cell in found]
    return cells


def fingerprint(root: Path, name: str) -> str:
    """Of all that a question's results follow from, as it is on disk: the simulator, its options, the question."""
    patterns = [f"megatron_medha/{folder}/**/*.py" for folder in SOURCES]
    patterns += ["conf/simulate.yaml", "conf/*/*.yaml"]
    here = HERE.relative_to(ROOT)
    patterns += [f"{here}/measures.py", f"{here}/question.py", f"{here}/{name}.yaml"]
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def report(question: Question) -> int:
    """Print and draw; how many bars are missed."""
    answers = Answers(question.name)
    planned = dict.fromkeys(cell.name for cell in _all_cells(question, ""))
    order = {name: place for place, name in enumerate(planned)}
    answers.cells = dict(sorted(answers.cells.items(), key=lambda one: order.get(one[0], len(order))))
    print(f"\n## {question.name}: {question.question}")
    print_tables(question, answers)
    num_missed = print_compared(question, answers)
    try:
        draw(question, answers)
    except KeyError as cell:
        print(f"no picture: {cell} has not been run")
    return num_missed


def main() -> int:
    """Run what is asked for; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="QUESTION", help="names of YAML files here; see --list")
    parser.add_argument("--all", action="store_true", help="every question, then docs/paper.md")
    parser.add_argument("--list", action="store_true", help="print the questions")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--part", default="", help="cells of this part instead of those without one")
    parser.add_argument("--report", action="store_true", help="run nothing; print, draw and write from results/")
    parser.add_argument("--fresh", action="store_true", help="run again what has run with these sources")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names()):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    if arguments.list or not (arguments.names or arguments.all):
        for name in names():
            print(f"{name:18s} {read(name).question}")
        return 0
    # The longest first, or it would end alone.
    wanted = sorted(names(), key=lambda name: name != "headline") if arguments.all else arguments.names
    questions = [read(name) for name in wanted]
    began_s = time.monotonic()
    if not arguments.report:
        run_all(questions, arguments.part, arguments.jobs, is_fresh=arguments.fresh)
    num_missed = sum(map(report, questions))
    if arguments.all:
        print(f"\n{write_page(ROOT / 'docs').relative_to(ROOT)} after {(time.monotonic() - began_s) / 60:.1f} minutes")
        return 0  # the page says which bars are missed, and why
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
