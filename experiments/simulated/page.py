"""docs/paper.md: every figure of the paper that can be read, beside ours; the rows are in paper.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec
import yaml

from experiments.simulated.figures import Answers, text_of, value_of
from experiments.simulated.question import HERE, Figure


class Row(Figure, forbid_unknown_fields=True, kw_only=True):
    """One figure of the paper, and which of ours stands beside it."""

    where: str
    what: str
    paper: str
    value: float | None = None   # the paper's, for the ratio
    question: str
    why: str = ""


class Section(msgspec.Struct, forbid_unknown_fields=True):
    """Rows that belong together."""

    title: str
    text: str
    rows: list[Row]
    pictures: dict[str, str] = {}  # question: caption


class Page(msgspec.Struct, forbid_unknown_fields=True):
    """The file."""

    head: str
    sections: list[Section]


def read_page() -> Page:
    """paper.yaml."""
    return msgspec.convert(yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8")), Page)


def write_page(docs: Path) -> Path:
    """Write it; the same results give the same bytes."""
    page, answers = read_page(), cache(Answers)
    parts = [page.head]
    for section in page.sections:
        parts.append(f"## {section.title}\n\n{section.text.strip()}\n")
        lines = (_line(row, answers(row.question)) for row in section.rows)
        parts.append("| paper | what | paper's | ours | ratio | from | where they differ |\n"
                     "| --- | --- | --- | --- | --- | --- | --- |\n" + "".join(lines))  # fmt: skip
        parts += [
            f"![{caption}](../experiments/simulated/results/{name}.png)\n" for name, caption in section.pictures.items()
        ]
    path = docs / "paper.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _line(row: Row, answers: Answers) -> str:
    try:
        ours, text = value_of(row, answers), text_of(row, answers)
    except KeyError:
        return f"| {row.where} | {row.what} | {row.paper} | not run yet | - | `{row.question}` | |\n"
    ratio = "-" if not row.value else _short(ours / row.value)
    return "| " + " | ".join([row.where, row.what, row.paper, text, ratio, f"`{row.question}`", row.why]) + " |\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
