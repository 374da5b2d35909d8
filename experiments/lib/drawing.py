"""Pictures without a screen."""

from __future__ import annotations

from typing import Any


def panels(
    rows: int = 1, columns: int = 1, *, width: float = 6.0, height: float = 3.6, **options: Any
) -> tuple[Any, Any]:
    """A matplotlib figure of panels of this size each, and their axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width * columns, height * rows)
    made: tuple[Any, Any] = pyplot.subplots(rows, columns, figsize=size, layout="constrained", **options)
    return made
