"""requests.jsonl of a run as requests.parquet; needs pyarrow."""

from __future__ import annotations

from pathlib import Path

from megatron_medha.sim.run_directory import REQUESTS


def write_parquet(run: Path) -> None:
    """Write requests.parquet beside requests.jsonl: the same rows and columns, typed alike in every run.

    A column in which a run has only nulls would have no type, and tables of several runs would not fit together: it is
    text for `why`, seconds otherwise.
    """
    import pyarrow
    from pyarrow import json, parquet

    table = json.read_json(run / REQUESTS)
    fields = [
        field.with_type(pyarrow.string() if field.name == "why" else pyarrow.float64())
        if pyarrow.types.is_null(field.type)
        else field
        for field in table.schema
    ]
    parquet.write_table(table.cast(pyarrow.schema(fields)), run / "requests.parquet")
