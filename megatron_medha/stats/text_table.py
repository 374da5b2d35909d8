"""Rows of text as a table for a terminal, and figures as its cells."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """The rows, each column as wide as its widest cell; a line a row. left: columns that are aligned there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def seconds_text(value: float | None) -> str:
    """Seconds or milliseconds, three or four digits; - for None."""
    if value is None:
        return "-"
    if value < 1.0:
        return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 100.0 else f"{value:,.0f} s"


def percent_text(value: float | None) -> str:
    """A share in percent; - for None. What rounds to nothing has no sign: sums of seconds are off in the last bit."""
    return "-" if value is None else f"{round(100.0 * value, 1) + 0.0:.1f}%"


def number_text(value: float | None) -> str:
    """A number of any size; - for None."""
    return "-" if value is None else f"{value:,.3f}" if value < 10.0 else f"{value:,.0f}"
