"""The script for GPU machines: rehearsed on a CPU, and its watch over processes that fail in every way they can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu import watch
from experiments.gpu.results import Results, lines_of

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.py"
needs_triton = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("triton"), reason="triton is not installed (pip install triton)"
)

# Says what experiments/gpu/worker.py says. Arguments: the chip, then what each case does.
FAKE = """
import json, os, signal, sys
told = json.load(sys.stdin)
pipe = os.fdopen(told["pipe"], "w")
def say(**message):
    pipe.write(json.dumps(message) + "\\n")
    pipe.flush()
say(machine={"chip": sys.argv[1]})
done = {tuple(case) for case in told["leave_out"]}
for name in sys.argv[2:]:
    if ("part", name) in done:
        continue
    say(part="part", begin=name, limit_s=0.5 if name == "hangs" else 60.0)
    if name == "hangs":
        signal.pause()
    if name == "dies":
        os._exit(9)
    say(fact=name, figure=2.0)
    rows = [{"what": name, "figure": told["facts"].get("first", 0.0)}]
    say(part="part", case=name, rows=rows, error="Traceback: out of memory" if name == "raises" else None)
say(over=True)
"""


def watched(path: Path, *cases: str, chip: str = "H200", forgets: tuple[str, ...] = ()) -> tuple[int, Results]:
    results = Results(path, [path], is_rehearsal=False, forgets=forgets)
    now_s = time.monotonic()
    failed = watch.run(
        [sys.executable, "-c", FAKE, chip, *cases], ["part"], results, deadline_s=now_s + 100, cwd=Path.cwd(),
        started_s=now_s,
    )  # fmt: skip
    return failed, results


def errors(path: Path) -> dict[str, Any]:
    return {line["case"]: line["error"] for line in lines_of(path) if "case" in line}


def test_a_case_that_raises_hangs_or_takes_the_process_with_it_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "check.jsonl"
    failed, _ = watched(path, "first", "raises", "hangs", "dies", "last")
    assert failed == 3
    found = errors(path)
    assert list(found) == ["first", "raises", "hangs", "dies", "last"]
    assert "out of memory" in found["raises"]
    assert "longer than" in found["hangs"]
    assert "exit code 9" in found["dies"]
    assert found["first"] is None
    assert found["last"] is None
    # Processes after the first know what it has measured.
    rows = {line["case"]: line["rows"] for line in lines_of(path) if "case" in line}
    assert rows["last"] == [{"what": "last", "figure": 2.0}]


def test_another_run_measures_what_is_missing_and_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "check.jsonl"
    watched(path, "first", "raises")
    with path.open("a") as file:
        file.write('{"part": "part", "case": "torn", "ro')  # the script was killed while it wrote
    failed, results = watched(path, "first", "raises", "torn")
    assert failed == 1
    assert [line["case"] for line in lines_of(path) if "case" in line] == ["first", "raises", "raises", "torn"]
    assert results.done == [("part", "first"), ("part", "torn")]
    watched(path, "first", forgets=("part",))
    assert list(errors(path)) == ["first"]


def test_results_of_another_chip_go_aside(tmp_path: Path) -> None:
    path = tmp_path / "check.jsonl"
    watched(path, "first")
    watched(path, "second", chip="B200")
    assert list(errors(path)) == ["second"]
    assert list(errors(tmp_path / "check.earlier.jsonl")) == ["first"]


def test_a_process_that_never_gets_to_a_case_is_not_started_for_ever(tmp_path: Path) -> None:
    results = Results(tmp_path / "check.jsonl", [], is_rehearsal=False, forgets=())
    now_s = time.monotonic()
    command = [sys.executable, "-c", "import sys; sys.exit(3)"]
    assert watch.run(command, ["part"], results, deadline_s=now_s + 100, cwd=tmp_path, started_s=now_s) == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@needs_triton
def test_every_case_runs_in_a_rehearsal_and_leaves_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "check.jsonl"
    done = run("--device", "cpu", "--tiny", "--minutes", "30", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(out)
    assert lines[0]["is_rehearsal"]
    cases = [line for line in lines if "case" in line]
    assert list(dict.fromkeys(line["part"] for line in cases)) == [
        "rates", "compile", "smoke", "correctness", "tpot", "attention", "decode", "linear", "same_as_cpu", "prefill",
        "more", "million", "convoy", "profile",
    ]  # fmt: skip
    for line in cases:
        assert line["error"] is None, line
        assert line["rows"], line
        if line["part"] in ("compile", "smoke", "correctness", "same_as_cpu"):
            assert all(row["verdict"] != "MISSED" for row in line["rows"]), line
    again = run("--device", "cpu", "--tiny", "--out", str(out), "--part", "rates,smoke")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(lines_of(out)) <= len(lines), "what was there was measured again"


def test_a_part_nobody_knows_is_refused_with_the_list() -> None:
    done = run("--device", "cpu", "--tiny", "--part", "attentoin")
    assert done.returncode == 2
    assert "no part attentoin; known: rates, compile" in done.stderr


@needs_triton
def test_a_case_that_runs_out_of_memory_says_so_and_the_next_one_runs() -> None:
    import torch

    from experiments.gpu.measure import Check, Row

    said: list[dict[str, Any]] = []
    check = Check(
        device=torch.device("cpu"), is_tiny=True, deadline_s=time.monotonic() + 100, say=said.append,
        leave_out=frozenset({("attention", "known")}), part="attention",
    )  # fmt: skip

    def too_large() -> None:
        check.add(Row("before", 1.0, "s"))
        raise torch.OutOfMemoryError("CUDA out of memory")

    check.case("known", 10, too_large)
    check.case("large", 10, too_large)
    check.case("small", 10, lambda: check.add(Row("after", float("nan"), "s")))
    ends = [json.loads(json.dumps(message, allow_nan=False)) for message in said if "case" in message]
    assert [end["case"] for end in ends] == ["large", "small"]
    assert "out of memory" in ends[0]["error"]
    assert [row["what"] for end in ends for row in end["rows"]] == ["before", "after"]
    assert ends[1]["error"] is None
