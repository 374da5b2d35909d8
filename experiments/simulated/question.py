"""A question as its YAML file states it, and the cells whose figures answer it: one simulation or calculation each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

import msgspec
import yaml

HERE = Path(__file__).parent
NOT_QUESTIONS = ("paper",)  # the rows of docs/paper.md


class Block(msgspec.Struct, forbid_unknown_fields=True):
    """Cells of one kind: every combination of the axes that their name has in braces."""

    cells: str                        # their name, such as "{layout} {qps}/s"
    measure: str = "stream"           # a function of measures.py
    options: list[str] = []           # of `medha simulate`, after the question's own
    arguments: dict[str, Any] = {}    # of the function
    only: dict[str, list[Any]] = {}   # by axis, the labels that are meant; all of the others
    part: str = ""                    # run with --part PART alone, without a part by default


class Search(msgspec.Struct, forbid_unknown_fields=True):
    """The largest label of an axis at which a figure still holds, by bisection; the last label does not."""

    name: str
    block: int
    axis: str
    labels: list[Any]     # ascending
    figure: str
    at_least: float
    only: dict[str, list[Any]]


class Figure(msgspec.Struct, forbid_unknown_fields=True):
    """A value, or one over another: "CELL > PATH" each."""

    of: str | float
    over: str | None = None
    parts: int = 1        # divided by this: efficiency of so many stages
    less: bool = False    # one less the ratio: what is saved
    minus: float = 0.0    # 1: by how much more
    show: str = "s"       # how it is written: a unit of figures.UNITS


class Compared(Figure, forbid_unknown_fields=True):
    """A figure beside what is published, or a bar."""

    what: str = ""
    each: dict[str, list[Any]] = {}                  # by axis: one for each label, which replaces {axis} in the texts
    published: str | float | dict[str, float] = ""   # a dictionary goes by the label of the first axis of `each`
    low: float | None = None                         # bars, in the unit shown
    high: float | None = None
    within: float | None = None                      # share of the published figure
    why: str = ""


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """One row a cell: those that the pattern matches, named by what its * stands for."""

    cells: str
    columns: dict[str, str]           # title: "PATH UNIT"
    relative_to: str | None = None    # a cell; figures are multiples of its own


class Question(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One file."""

    question: str
    blocks: list[Block]
    options: list[str] = []
    axes: dict[str, list[Any] | dict[str, Any]] = {}
    searches: list[Search] = []
    tables: list[Table] = []
    compared: list[Compared] = []
    undominated: list[dict[str, Any]] = []  # cells of `by` none of which is better than one of `cells` in all `figures`
    titles: dict[str, str] = {}             # of labels, in tables and pictures
    picture: dict[str, Any] = {}
    name: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    name: str
    measure: str
    words: tuple[str, ...]
    arguments: dict[str, Any]
    part: str = ""

    @property
    def key(self) -> str:
        """Equal for cells of different questions that are the same run."""
        return json.dumps([self.measure, sorted(self.words), self.arguments], sort_keys=True)


def names() -> list[str]:
    """Of all questions."""
    return sorted(path.stem for path in HERE.glob("*.yaml") if path.stem not in NOT_QUESTIONS)


def read(name: str) -> Question:
    """A question. Raises msgspec.ValidationError for a file that is none."""
    values = _with_text_keys(yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8")))
    question = msgspec.convert(values, Question)
    question.name = name
    return question


def cells_of(question: Question, part: str = "") -> Iterator[Cell]:
    """Of every block, in the file's order."""
    for block in question.blocks:
        if block.part == part:
            yield from _cells(question, block)


def searched(question: Question, search: Search) -> Iterator[tuple[str, list[Cell]]]:
    """What each search is for, and a cell for each label of its axis."""
    block = question.blocks[search.block]
    for labels in combinations(question, block.cells, block.only | search.only | {search.axis: [search.labels[0]]}):
        found = [cell_at(question, block, labels | {search.axis: str(label)}) for label in search.labels]
        yield next(labels[axis] for axis in search.only), found


def combinations(question: Question, template: str, only: dict[str, list[Any]]) -> Iterator[dict[str, str]]:
    """Labels by axis, of the axes that a template has in braces."""
    axes = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    choices = [[str(label) for label in only.get(axis, question.axes[axis])] for axis in axes]
    for labels in product(*choices):
        yield dict(zip(axes, labels, strict=True))


def cell_at(question: Question, block: Block, labels: dict[str, str]) -> Cell:
    """One cell of a block; a label adds options, or arguments, or is the argument of its axis's name."""
    words, arguments = [*question.options, *block.options], dict(block.arguments)
    for axis, label in labels.items():
        values = question.axes[axis]
        if isinstance(values, list):
            arguments[axis] = next(value for value in values if str(value) == label)
        elif isinstance(values[label], list):
            words += values[label]
        else:
            added = dict(values[label])
            words += added.pop("options", [])
            arguments |= added
    return Cell(block.cells.format(**labels), block.measure, tuple(words), arguments, block.part)


def _cells(question: Question, block: Block) -> Iterator[Cell]:
    for labels in combinations(question, block.cells, block.only):
        yield cell_at(question, block, labels)


def _with_text_keys(value: Any) -> Any:
    """YAML reads 8 and 0.25 as numbers; as labels they are text."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(one) for key, one in value.items()}
    return [_with_text_keys(one) for one in value] if isinstance(value, list) else value
