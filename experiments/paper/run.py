"""Every simulated experiment anew, two at a time, then the page that puts ours beside the paper's: docs/paper.md.

    make paper                                      # or: python -m experiments.paper.run
    python -m experiments.paper.run --page          # the page alone, from the results that are there
    python -m experiments.paper.run --fresh         # also what has been run with these very sources

What has run with the sources as they are is not run again; broken off, it goes on where it was when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from experiments.paper.page import write_page
from experiments.paper.schedule import Task, eta_s
from experiments.paper.sources import fingerprint

ROOT = Path(__file__).parents[2]
STATE = ROOT / "multirun" / "paper"
# Seconds of one core, as measured; only the bar and the order depend on them. The longest first.
HEADLINE = Task("headline", 500.0)
OTHERS = (
    Task("ablations", 180.0, needs=("headline", "kvp_tpot")), Task("misprediction", 80.0, needs=("headline",)),
    Task("spp_scaling", 30.0), Task("starvation", 30.0, needs=("headline",)), Task("three_d", 30.0),
    Task("kvp_tradeoff", 20.0), Task("mfu_mbu", 18.0, needs=("kvp_tpot",)), Task("published_facts", 14.0),
    Task("adaptive_chunks", 12.0), Task("kvp_tpot", 8.0), Task("spp_against_cp", 6.0), Task("published_ttft", 6.0),
)  # fmt: skip
MISSED_BAR = 1  # how an experiment ends that ran well and did not reach its bar; its page says which


@dataclass(slots=True)
class Runs:
    """The experiments' processes, and what is known of those that ended: STATE/NAME.json."""

    num_jobs: int
    running: dict[str, tuple[Task, subprocess.Popen[bytes], float]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def start(self, task: Task, *words: str) -> None:
        """Start one; half-done results of other sources are put away first."""
        state = _state(task)
        mark = {"sources": fingerprint(ROOT, task), "ended": False}
        results = ROOT / "experiments" / task.name / "results.json"
        if (state.get("sources"), state.get("ended")) != (mark["sources"], False):
            results.unlink(missing_ok=True)
        _write_state(task, mark)
        with (STATE / f"{task.name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"experiments.{task.name}.run", *words], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        self.running[task.name] = (task, process, time.monotonic())

    def collect(self) -> list[Task]:
        """Those that have ended since."""
        ended = []
        for name, (task, process, began_s) in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[name]
            ended.append(task)
            log = (STATE / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            # Python ends with 1 on an exception, too.
            if code not in (0, MISSED_BAR) or "Traceback (most recent call last)" in log:
                self.broken.append(name)
                print(f"{name} broke off with code {code}; see {STATE / name}.log", file=sys.stderr)
            else:
                _write_state(task, _state(task) | {"ended": True, "took_s": round(time.monotonic() - began_s, 1)})
        return ended

    def stop(self) -> None:
        """End what runs, with the processes it has started."""
        for _, process, _ in self.running.values():
            os.killpg(process.pid, signal.SIGKILL)  # results are written after every run; nothing else is lost
            process.wait()


def run_all(num_jobs: int, is_fresh: bool) -> list[str]:
    """Run what is missing; the names of those that broke off."""
    STATE.mkdir(parents=True, exist_ok=True)
    left = [task for task in (HEADLINE, *OTHERS) if is_fresh or not _is_done(task)]
    if is_fresh:
        for task in left:
            _state_path(task).unlink(missing_ok=True)
    runs = Runs(num_jobs)
    with tqdm(total=round(sum(task.core_s for task in left)), bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} "
              "{postfix}", desc="paper") as bar:
        try:
            while left or runs.running:
                # The headline takes all processes for itself, each with another system.
                if HEADLINE in left and not runs.running:
                    runs.start(HEADLINE, "--jobs", str(num_jobs))
                    left.remove(HEADLINE)
                while left and "headline" not in runs.running and len(runs.running) < num_jobs:
                    runs.start(left.pop(0))
                time.sleep(0.2)
                for task in runs.collect():
                    bar.update(round(task.core_s))
                now_s = time.monotonic()
                under_way = [(task, now_s - began_s) for task, _, began_s in runs.running.values()]
                minutes = eta_s(under_way, left, num_jobs) / 60
                names = ", ".join(runs.running)
                bar.set_postfix_str(f"{names}; about {minutes:.1f} min left on a quiet machine" if names else "")
        finally:
            runs.stop()
    return runs.broken


def _is_done(task: Task) -> bool:
    state = _state(task)
    has_results = (ROOT / "experiments" / task.name / "results.json").exists()
    return has_results and state.get("ended") is True and state.get("sources") == fingerprint(ROOT, task)


def _state_path(task: Task) -> Path:
    return STATE / f"{task.name}.json"


def _state(task: Task) -> dict[str, object]:
    try:
        state: dict[str, object] = json.loads(_state_path(task).read_text())
    except (OSError, ValueError):
        return {}
    return state


def _write_state(task: Task, state: dict[str, object]) -> None:
    _state_path(task).write_text(json.dumps(state) + "\n")


def main() -> int:
    """Run, write the page; 1 if an experiment broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--fresh", action="store_true", help="run everything, whatever has run already")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    broken = [] if arguments.page else run_all(arguments.jobs, arguments.fresh)
    if broken:
        print(f"no page: {', '.join(broken)} broke off", file=sys.stderr)
        return 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{write_page(ROOT).relative_to(ROOT)} after {(time.monotonic() - began_s) / 60:.1f} minutes, "
          f"{(used.ru_utime + used.ru_stime) / 60:.1f} minutes of one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
