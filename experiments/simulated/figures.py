"""Answers as they are kept, figures read from them, and the tables that are printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fnmatch import translate
from pathlib import Path
from typing import Any

from experiments.simulated.question import HERE, Compared, Figure, Question, Table, combinations

RESULTS = HERE / "results"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# A factor to what is kept (seconds, shares), and how it is written then.
UNITS: dict[str, tuple[float, Callable[[float], str]]] = {
    "times": (1, lambda value: f"{_plain(value)}x"),
    "at_least": (1, lambda value: f"at least {value:.3g}x"),
    "plain": (1, _plain),
    "s": (1, lambda value: f"{_plain(value)} s"),
    "ms": (1e3, lambda value: f"{_plain(value)} ms"),
    "min": (1 / 60, lambda value: f"{value:.3g} min"),
    "%": (100, lambda value: f"{value:.3g}%"),
    "/s": (1, lambda value: f"{value:g} /s"),
    "M": (1 / (1 << 20), lambda value: f"{value:.3g}M"),
}


class Answers:
    """results/NAME.json: figures by cell, what searches found; written after each, so that a killed run goes on."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        values = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.cells: dict[str, dict[str, Any]] = values.get("cells", {})
        self.searches: dict[str, dict[str, list[float]]] = values.get("searches", {})

    def write(self) -> None:
        """A line for each cell, in the order of names, as cells end in none of their own."""
        groups: dict[str, dict[str, Any]] = {"cells": self.cells, "searches": self.searches}
        blocks = []
        for group, values in groups.items():
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values[name])}" for name in sorted(values))
            blocks.append(f' "{group}": {{\n{lines}\n }}')
        draft = self.path.with_suffix(".part")
        draft.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
        draft.replace(self.path)

    def at(self, place: str | float) -> float:
        """The figure at "CELL > PATH", or of a search at "NAME > LABEL > 0", 1: holds there, not there."""
        if not isinstance(place, str):
            return float(place)
        name, *path = place.split(" > ")
        value: Any = self.cells.get(name) or self.searches[name]
        if name in self.searches:
            label, place_in_bounds = path
            return float(value[label][int(place_in_bounds)])
        return float(at_path(value, *path))

    def matching(self, pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Cells by what the pattern's * stands for; all of the name where it has none."""
        expression = re.compile(translate(pattern).replace(".*", "(.*)"))
        for name, values in self.cells.items():
            if found := expression.fullmatch(name):
                yield " ".join(found.groups()) or name, values


def value_of(figure: Figure, answers: Answers) -> float:
    """In the unit it is shown in. Raises KeyError if a cell of it has not been run."""
    value = answers.at(figure.of)
    if figure.over is not None:
        value /= answers.at(figure.over) * figure.parts
    value = (1.0 - value if figure.less else value) - figure.minus
    return value * UNITS[figure.show][0]


def text_of(figure: Figure, answers: Answers) -> str:
    """With its unit."""
    return UNITS[figure.show][1](value_of(figure, answers))


def print_tables(question: Question, answers: Answers) -> None:
    """All that have a row."""
    for table in question.tables:
        _print_table(question, table, answers)
    for name, found in answers.searches.items():
        print(f"\n| {name} | holds at | not at |\n| --- | --- | --- |")
        for label, (low, high) in found.items():
            print(f"| {question.titles.get(label, label)} | {low:g} | {high:g} |")


def _print_table(question: Question, table: Table, answers: Answers) -> None:
    rows = list(answers.matching(table.cells))
    base = None if table.relative_to is None else answers.cells.get(table.relative_to)
    if not rows or (table.relative_to is not None and base is None):
        return
    relative = f", as multiples of {table.relative_to}" if table.relative_to else ""
    print(f"\n| {table.cells}{relative} | " + " | ".join(table.columns) + " |")
    print("|" + " --- |" * (1 + len(table.columns)))
    for label, values in rows:
        cells = [_cell(values, column, base) for column in table.columns.values()]
        print("| " + " | ".join([question.titles.get(label, label), *cells]) + " |")


def _cell(values: dict[str, Any], column: str, base: dict[str, Any] | None) -> str:
    path, unit = column.split()
    try:
        value = at_path(values, path)
        if base is not None:
            return f"{value / at_path(base, path):.2g}x"
    except KeyError:
        return "-"
    factor, write = UNITS[unit]
    return str(value) if isinstance(value, bool) else write(value * factor)


def at_path(values: Any, path: str) -> Any:
    """values["all"]["ttft_p50_s"] for "all.ttft_p50_s"."""
    for key in path.split("."):
        values = values[key]
    return values


def each_compared(question: Question) -> Iterator[tuple[Compared, str | float]]:
    """Every comparison with its axes' labels put in, and what is published."""
    for one in question.compared:
        if not one.each:
            assert not isinstance(one.published, dict)
            yield one, one.published
            continue
        template = " ".join(f"{{{axis}}}" for axis in one.each)
        for labels in combinations(question, template, one.each):
            put: dict[str, Any] = {
                key: text.format(**labels) if isinstance(text := getattr(one, key), str) else text
                for key in one.__struct_fields__
            }
            published = put.pop("published")
            if isinstance(published, dict):
                published = published[next(iter(labels.values()))]
            yield Compared(published=published, **put), published


def print_compared(question: Question, answers: Answers) -> int:
    """Figures beside what is published and bars; how many of the bars are missed."""
    rows, num_missed = [], 0
    for one, published in each_compared(question):
        try:
            ours = value_of(one, answers)
        except KeyError:
            continue  # not run: another part's
        low, high = one.low, one.high
        if one.within is not None:
            low, high = float(published) * (1 - one.within), float(published) * (1 + one.within)
        holds = (low is None or ours >= low) and (high is None or ours <= high)
        num_missed += not holds
        bar = " to ".join(f"{bound:.4g}" for bound in (low, high) if bound is not None)
        words = "at least " if high is None else "at most " if low is None else ""
        verdict = "" if not bar else "met" if holds else "**missed**"
        theirs = published if isinstance(published, str) else UNITS[one.show][1](published)
        what = one.what or str(one.of)
        rows.append([what, theirs, text_of(one, answers), bar and words + bar, verdict, one.why])
    if rows:
        print("\n| what | published | ours | bar | | |\n|" + " --- |" * 6)
        for row in rows:
            print("| " + " | ".join(row) + " |")
    for rule in question.undominated:
        num_missed += _print_dominated(answers, **rule)
    return num_missed


def _print_dominated(answers: Answers, *, cells: str, by: str, figures: list[str]) -> bool:
    worse = [
        name for name, ours in answers.matching(cells)
        if any(all(other[key] < ours[key] for key in figures) for _, other in answers.matching(by))
    ]  # fmt: skip
    print(f"\nno `{by}` is better than a `{cells}` in both {' and '.join(figures)}: "
          f"{'**missed** by ' + ', '.join(worse) if worse else 'met'}")
    return bool(worse)


def picture_of(name: str) -> Path:
    """Of a question, beside its results."""
    return RESULTS / f"{name}.png"
