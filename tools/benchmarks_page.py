"""Prints docs/benchmarks.md from experiments/*/results.json and experiments/figures.toml.

    python tools/benchmarks_page.py > docs/benchmarks.md

A test compares the page with what this prints.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

_HEAD = """\
# Benchmarks

Each row has a question, what was measured, the target that was set before, and the command that measures it again in a
working copy after `make test`. Rows marked **missed** missed their target. `python tools/benchmarks_page.py` makes this
page. [experiments](../experiments/README.md) says how each was measured.

No figure here is from a GPU. Machines:

{machines}

The shared machine is noisy: repeated work varies by 14% (p95), and sometimes everything runs at half speed for minutes.
On noisy machines the scheduler targets shorter steps, so only 30% of steps end within 10% below the budget; single step
times are predicted to within 9% (p50) and 34% (p95) there. *Stated* is the day when the row was last changed here.

![Short prompts beside long ones](peers.svg)

Short prompts' p99 TTFT at the same load on the same two cores, three seeds, 95% short prompts and 5% of 8K to 16K
tokens, at the rate that keeps vLLM 70% busy. "vLLM at its best" has priorities, small steps and a cap on long prefills
([all servers](../experiments/peers/README.md)). `python tools/peers_picture.py` draws it.
"""
_COLUMNS = "| question | result | target | command | machine, stated |\n| --- | --- | --- | --- | --- |"


def benchmarks_page() -> str:
    """The whole page."""
    stated = tomllib.loads((EXPERIMENTS / "figures.toml").read_text(encoding="utf-8"))
    figures = [*stated["figures"]]
    figures[1:1] = [_exact_hits(), _first_model()]
    machines = "\n".join(f"* `{name}`: {text}" for name, text in stated["machines"].items())
    sections = [_HEAD.format(machines=machines)]
    for area in dict.fromkeys(figure["area"] for figure in figures):
        rows = "".join(_row(figure) for figure in figures if figure["area"] == area)
        sections.append(f"## {area}\n\n{_COLUMNS}{rows}\n")
    return "\n".join(sections)


def _row(figure: dict[str, Any]) -> str:
    where = f"`{figure['machine']}`, {figure['stated']}"
    return f"\n| {figure['question']} | {figure['result']} | {figure['target']} | {figure['command']} | {where} |"


def _exact_hits() -> dict[str, Any]:
    """From the counts of experiments/exact_hits."""
    cells = json.loads((EXPERIMENTS / "exact_hits" / "results.json").read_text(encoding="utf-8"))["cells"]
    outputs = sum(cell["num_tokens"] for cell in cells.values())
    steps = sum(cell["counts"]["steps"] for cell in cells.values())
    bits = sum(cell["num_other_bits"] for name, cell in cells.items() if " bits, " in name)
    tokens = sum(cell["num_other_tokens"] for cell in cells.values())
    return {
        "area": "Exactness",
        "question": f"Do hits of the prefix cache change outputs? Conversations on real ranks with and without it, "
        f"{steps:,} steps, {outputs:,} outputs, {len(cells)} cells of layouts and seeds",
        "result": f"log-probabilities with other bits (one device, spp 1 to 3): {bits}; other greedy tokens: {tokens}",
        "target": "none",
        "command": "`python -m experiments.exact_hits.run`",
        "machine": "amx",
        "stated": "from its results file",
    }


def _first_model() -> dict[str, Any]:
    """From the answers of experiments/first_model."""
    found = json.loads((EXPERIMENTS / "first_model" / "results.json").read_text(encoding="utf-8"))
    return {
        "area": "Exactness",
        "question": "Does the model of `make serve` write what transformers does, greedily in float32?",
        "result": f"{found['same_text']} of {found['questions']} texts are equal",
        "target": "all",
        "command": "`python -m experiments.first_model.run`",
        "machine": "amx",
        "stated": "from its results file",
    }


if __name__ == "__main__":
    print(benchmarks_page(), end="")
