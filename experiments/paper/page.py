"""docs/paper.md: every figure of the paper that can be read beside ours, from the experiments' results.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.paper.rows import SECTIONS, Row

Results = Callable[[str], Any]
_HEAD = """\
# The paper's figures, and ours

    make paper

Written by that command: it runs every simulated experiment (two at a time; what has run with the same sources is not
run again) and then this page. The paper is *No Request Left Behind* / Medha, arXiv:2409.17264, version 5. Ours are
simulated: the server's own scheduler in virtual time, on GPUs that are only calculated. The cost model was fitted to
published profiles of single layers and to two of the paper's figures, which the last column names; the rest follows.

*Ratio* is ours over the paper's. Where the paper's plots cannot be read, its text is what is compared. *From* names
the experiment: `python -m experiments.NAME.run` runs it alone.

**In short.** What follows from arithmetic and scheduling is there: the convoy and its end, the price of small chunks,
how prefills scale over stages and decodes over KV shards. What is not there: a stream pipeline that beats an ideal
ring, a p99 of all requests 174 times better when one in twenty is long, and half the time per token of three
dimensions against two.
"""


def write_page(root: Path) -> Path:
    """Write it; the same results give the same bytes."""
    loaded: dict[str, Any] = {}

    def results(name: str) -> Any:
        if name not in loaded:
            loaded[name] = json.loads((root / "experiments" / name / "results.json").read_text())
        return loaded[name]

    parts = [_HEAD]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n\n{section.text.strip()}\n")
        parts.append("| paper | what | paper's | ours | ratio | from | where they differ |\n| --- | --- | --- | --- | "
                     "--- | --- | --- |\n" + "".join(_line(row, results) for row in section.rows))
        parts += [f"![{title}](../experiments/{path})\n" for title, path in section.pictures]
    page = root / "docs" / "paper.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _line(row: Row, results: Results) -> str:
    try:
        ours = row.ours(results)
    except (KeyError, FileNotFoundError):
        return f"| {row.where} | {row.what} | {row.paper} | not run yet | - | `{row.experiment}` | |\n"
    ratio = "-" if row.value is None or row.value == 0 else _short(ours / row.value)
    cells = (row.where, row.what, row.paper, row.show(ours), ratio, f"`{row.experiment}`", row.why)
    return "| " + " | ".join(cells) + " |\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
