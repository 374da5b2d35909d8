"""The picture of a question, as its YAML lays it out: panels of lines, or of the spread of some figures by cell."""

from __future__ import annotations

from typing import Any

from experiments.lib.drawing import panels
from experiments.simulated.figures import UNITS, Answers, at_path, picture_of
from experiments.simulated.question import Question

_SPREAD_COLOURS = ("#1f77b4", "#ff7f0e", "#d62728")


def draw(question: Question, answers: Answers) -> None:
    """Nothing, where the question has no picture. Raises KeyError naming a cell that has not been run."""
    picture = question.picture
    if not picture:
        return
    wanted = picture["panels"]
    width, height = picture.get("size", (5.5, 3.6))
    figure, axes = panels(
        columns=len(wanted), width=width, height=height, squeeze=False, sharey="spread" in wanted[0]
    )
    for axis, panel in zip(axes[0], wanted, strict=True):
        if "spread" in panel:
            _draw_spread(axis, panel, question, answers)
        else:
            _draw_lines(axis, panel, answers)
            if "more" in panel:
                _draw_lines(axis, panel | panel["more"], answers)
        for level in panel.get("levels", ()):
            axis.axhline(level, color="0.6", linewidth=0.8)
        axis.set(**panel.get("set", {}))
        if "spread" in panel:
            axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    if title := picture.get("title"):
        figure.suptitle(title, fontsize=9)
    figure.savefig(picture_of(question.name), dpi=100)


def _draw_lines(axis: Any, panel: dict[str, Any], answers: Answers) -> None:
    """lines: by label, the cells' name with {x} for each of `values`, or "CELL over CELL"; or published points by x.

    x, y: "PATH UNIT" in a cell. Without x it is what `values` says, or maps {x} to.
    """
    values = panel["values"] if isinstance(panel["values"], dict) else {x: x for x in panel["values"]}
    for label, line in panel["lines"].items():
        if isinstance(line, dict):
            axis.plot(list(map(float, line)), list(line.values()), marker="s", color="black", label=label)
            continue
        template, _, below = line.partition(" over ")
        xs, ys = [], []
        for x, place in values.items():
            cell = answers.cells[template.format(x=x)]
            xs.append(_figure(cell, panel["x"]) if "x" in panel else float(place))
            ys.append(_figure(cell, panel["y"]))
            if below:
                ys[-1] /= _figure(answers.cells[below.format(x=x)], panel["y"])
        axis.plot(xs, ys, marker="o", label=label)
    axis.legend(fontsize=7)


def _draw_spread(axis: Any, panel: dict[str, Any], question: Question, answers: Answers) -> None:
    """spread: a pattern, of whose cells each is a row; figures: "PATH UNIT", a dot of each."""
    rows = list(reversed(list(answers.matching(panel["spread"]))))
    for place, (_, values) in enumerate(rows):
        points = [_figure(values, column) for column in panel["figures"]]
        axis.plot(points, [place] * len(points), color="0.75", zorder=1)
        axis.scatter(points, [place] * len(points), c=_SPREAD_COLOURS[: len(points)], zorder=2, s=22)
    axis.set_yticks(range(len(rows)), [question.titles.get(label, label) for label, _ in rows], fontsize=8)


def _figure(values: dict[str, Any], column: str) -> float:
    path, unit = column.split()
    return float(at_path(values, path)) * UNITS[unit][0]
