"""Do `medha bench` and another project's client measure the same of the same server?

    python -m experiments.client_agreement.run checkpoints/tiny --vllm VENV/bin/vllm

The other client is `vllm bench serve`. Both put the same load on one server (runtime=sim: Llama-3 8B on an H100, whose
steps take the time that is calculated for them): prompts of one length, answers of one length, Poisson arrivals, all
requests counted. They take turns. For every figure: the median over the runs of each client, their difference, and how
far apart runs of the same client are. Differences within that are noise; the bar is the larger of it and 5%.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.lib.server_process import serving

OUT = Path("outputs/client_agreement")
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 48
QPS = 3.0
MIN_BAR = 0.05
QUANTILES = (50, 99)
# Ours and theirs; theirs in milliseconds.
LATENCIES = {"TTFT": ("ttft_s", "ttft"), "TPOT": ("tpot_s", "tpot"), "ITL": ("tbt_s", "itl"), "E2E": ("e2e_s", "e2el")}


def ours(url: str, num_requests: int, seed: int, folder: Path) -> dict[str, float]:
    """`medha bench`, without its measuring of an idle server."""
    trace, out = folder / "lengths.csv", folder / "medha"
    rows = [f"{PROMPT_TOKENS},{OUTPUT_TOKENS}\n"] * num_requests
    trace.write_text("prompt_tokens,output_tokens\n" + "".join(rows))
    _run([
        sys.executable, "-m", "megatron_medha", "bench", f"url={url}", "workload=trace", f"workload.path={trace}",
        f"workload.qps={QPS}", "idle=skip", "slo.ttft_s=1", "exclude_share=0", "plots=never", f"seed={seed}",
        f"out={out}",
    ])  # fmt: skip
    every: dict[str, Any] = json.loads((out / "summary.json").read_text())
    (one_class,) = every["classes"].values()
    values = {
        f"{name} p{quantile}": float(one_class[key][f"p{quantile}"])
        for name, (key, _) in LATENCIES.items()
        for quantile in QUANTILES
    }
    return values | {"output tokens/s": float(every["all"]["output_tokens_per_s"])}


def theirs(url: str, num_requests: int, seed: int, folder: Path, vllm: Path, tokenizer: Path) -> dict[str, float]:
    """`vllm bench serve`."""
    _run([
        str(vllm), "bench", "serve", "--backend", "openai", "--base-url", url, "--model", "llama3_8b",
        "--tokenizer", str(tokenizer), "--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS),
        "--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(num_requests), "--request-rate", str(QPS),
        "--ignore-eos", "--seed", str(seed), "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", ",".join(map(str, QUANTILES)), "--save-result", "--result-dir", str(folder),
        "--result-filename", "vllm.json", "--disable-tqdm",
    ])  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "vllm.json").read_text())
    assert found["completed"] == num_requests, f"{found['completed']} of {num_requests} requests of vLLM's client ended"
    values = {
        f"{name} p{quantile}": found[f"p{quantile}_{key}_ms"] / 1e3
        for name, (_, key) in LATENCIES.items()
        for quantile in QUANTILES
    }
    return values | {"output tokens/s": float(found["output_throughput"])}


def _run(command: list[str]) -> None:
    """Raises SystemExit with what it printed if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stdout}\n{done.stderr}")


def main() -> int:
    """Take turns, compare; 1 if a figure is further apart than its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="directory with tokenizer.json; the model itself is not run")
    parser.add_argument("--vllm", type=Path, required=True, help="the vllm program of its own virtual environment")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each client (default 4)")
    parser.add_argument("--requests", type=int, default=90, help="of a run (default 90)")
    arguments = parser.parse_args()
    clients: dict[str, Callable[[str, int, Path], dict[str, float]]] = {
        "medha bench": lambda url, seed, folder: ours(url, arguments.requests, seed, folder),
        "vllm bench serve": lambda url, seed, folder: theirs(
            url, arguments.requests, seed, folder, arguments.vllm, arguments.tokenizer
        ),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    with (
        serving("runtime=sim", "model=llama3_8b", "hardware=h100", f"tokenizer={arguments.tokenizer}",
                "server.served_model_names=[llama3_8b]") as port,
        tqdm(total=2 * arguments.rounds, unit="run") as bar,
    ):  # fmt: skip
        for seed in range(arguments.rounds):
            for name, client in clients.items():
                with tempfile.TemporaryDirectory() as folder:
                    runs[name].append(client(f"http://127.0.0.1:{port}", seed, Path(folder)))
                bar.update()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    return report(runs)


def report(runs: dict[str, list[dict[str, float]]]) -> int:
    """Print the table; 1 if a figure is further apart than its bar."""
    (_, mine), (_, other) = runs.items()
    print("| figure | medha bench | vllm bench serve | difference | runs of one client differ by | |")
    print("|" + " --- |" * 6)
    num_missed = 0
    for figure in mine[0]:
        medians = [statistics.median(run[figure] for run in client) for client in (mine, other)]
        apart = abs(medians[0] / medians[1] - 1)
        noise = max(
            (max(run[figure] for run in client) - min(run[figure] for run in client)) / median
            for client, median in zip((mine, other), medians, strict=True)
        )
        holds = apart <= max(noise, MIN_BAR)
        num_missed += not holds
        cells = [_text(figure, median) for median in medians]
        print(f"| {figure} | {cells[0]} | {cells[1]} | {medians[0] / medians[1] - 1:+.1%} | {noise:.1%} "
              f"| {'within' if holds else 'MISSED'} |")
    return 1 if num_missed else 0


def _text(figure: str, value: float) -> str:
    return f"{value:.1f}" if figure.endswith("/s") else f"{1e3 * value:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
