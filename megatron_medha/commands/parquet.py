"""requests.jsonl of a run as requests.parquet; needs pyarrow."""

from __future__ import annotations

from pathlib import Path

from megatron_medha.sim.run_directory import REQUESTS


def write_parquet(run: Path) -> None:
    """Write requests.parquet beside requests.jsonl."""
    from pyarrow import json, parquet

    parquet.write_table(json.read_json(run / REQUESTS), run / "requests.parquet")
