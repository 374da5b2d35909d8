"""Three policies under three loads: the real engine on this CPU and the simulator, one command each, one report.

    python -m experiments.policy_by_load.run checkpoints/tiny

The sweep of the real engine is killed (SIGKILL, with its server) when it has done a third, and started again: what is
done is not run again. Prints both commands; the report goes to report.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_medha.cli.reports.report_runs import find_runs

HERE = Path(__file__).parent
POLICIES = ("fcfs", "edf", "lars")
# Long ones are 2,000 to 20,000 tokens here, one in eight; a first token is wanted within a second.
WORKLOAD = (
    "workload=small_mix_05pct", "workload.qps=0.25,0.5,1", "workload.duration_s=30", "workload.long_share=0.125",
    "workload.long_prompt_scale=0.02", "slo.ttft_s=1", "seed=7", "plots=never",
)  # fmt: skip
KILLED_AFTER = 3  # of nine


def bench_words(checkpoint: str, out: Path) -> list[str]:
    """`medha bench -m` over policies of a server of its own and loads."""
    servers = ",".join(f"'checkpoint={checkpoint} scheduler={policy}'" for policy in POLICIES)
    return ["bench", "-m", f"serve={servers}", *WORKLOAD, "idle=skip", f"out={out}"]


def simulate_words(slower: float, out: Path) -> list[str]:
    """`medha simulate -m` over the same, on a CPU that is so many times slower than conf/hardware/cpu."""
    conf = str((HERE / "conf").relative_to(Path.cwd()))
    return ["simulate", "-m", "--config-dir", conf, "model=tiny", "hardware=cpu", "parallel=single",
            f"truth.linear_bias={slower:g}", f"truth.attention_bias={slower:g}", "belief=online", "classes=small",
            f"scheduler={','.join(POLICIES)}", *WORKLOAD, "record.trace_duration_s=0", f"out={out}"]  # fmt: skip


def _medha(words: list[str]) -> subprocess.Popen[bytes]:
    print(f"\n$ medha {shlex.join(words)}", flush=True)
    return subprocess.Popen([sys.executable, "-m", "megatron_medha", *words], start_new_session=True)


def _num_done(out: Path) -> int:
    return len(list(out.glob("*/summary.json")))


def main() -> int:
    """Sweep, kill, go on, simulate, report; 1 if a job is missing at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a small model")
    parser.add_argument("--out", type=Path, default=Path("multirun/policy_by_load"), help="of both sweeps")
    parser.add_argument("--slower", type=float, default=1.0, help="than conf/hardware/cpu this machine is (default 1)")
    arguments = parser.parse_args()
    real, simulated = arguments.out / "real", arguments.out / "simulated"

    if _num_done(real) < KILLED_AFTER:
        sweep = _medha(bench_words(arguments.checkpoint, real))
        while _num_done(real) < KILLED_AFTER and sweep.poll() is None:
            time.sleep(0.2)
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
            sweep.wait()
            print(f"killed after {_num_done(real)} of {3 * len(POLICIES)} jobs", flush=True)
    before = {path: path.stat().st_mtime_ns for path in real.glob("*/summary.json")}
    code = _medha(bench_words(arguments.checkpoint, real)).wait()
    again = [path.parent.name for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns]
    print(f"done before it was killed: {len(before)}; of these run again: {again or 'none'}")
    code |= _medha(simulate_words(arguments.slower, simulated)).wait()
    report = ["report", str(real), str(simulated), f"out={HERE}"]
    code |= _medha(report).wait()
    num_runs = len(find_runs([real, simulated]))
    print(f"{num_runs} runs in the report, of {6 * len(POLICIES)}")
    return 1 if code or again or num_runs < 6 * len(POLICIES) else 0


if __name__ == "__main__":
    sys.exit(main())
