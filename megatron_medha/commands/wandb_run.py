"""A simulation or benchmark in Weights & Biases: config, samples, summary, tables, plots and files of its directory."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_medha.config import TrackingConfig
from megatron_medha.core.errors import DependencyError

_MAX_ROWS = 10_000  # of a table of requests; W&B shows no more, and the whole is in the artifact

# Files of a run directory that are worth keeping with the run.
_ARTIFACT_FILES = (
    "config.yaml", "run.json", "summary.json", "summary.txt", "requests.jsonl", "requests.parquet", "samples.jsonl",
    "decisions.jsonl", "trace.json",
)  # fmt: skip


def mode_of(wandb_mode: str) -> str:
    """online or offline: what the options say, else what W&B's own variable says, else whether there is a key."""
    if wandb_mode != "auto":
        return wandb_mode
    if said := os.environ.get("WANDB_MODE"):
        return said
    has_key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
    return "online" if has_key else "offline"


class WandbRun:
    """One W&B run, or nothing at all where none is asked for."""

    def __init__(self, tracking: TrackingConfig, job_type: str, config: Mapping[str, Any], directory: Path) -> None:
        """Raises DependencyError if wandb is asked for and missing."""
        self._run: Any = None
        if tracking.wandb_project is None:
            return
        if importlib.util.find_spec("wandb") is None:
            raise DependencyError(
                f"tracking.wandb_project={tracking.wandb_project}: wandb is not installed; "
                "pip install 'megatron_medha[tracking]', or tracking=none"
            )
        import wandb

        mode = mode_of(tracking.wandb_mode)
        self._run = wandb.init(
            project=tracking.wandb_project,
            group=tracking.wandb_group,
            job_type=job_type,
            name=directory.name,
            mode=mode,
            config=dict(config),
            # Its files go beside the results, so that a run that was made offline can be found and synced.
            dir=str(directory),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("time_s")
        self._run.define_metric("*", step_metric="time_s")
        if mode == "offline":
            print(f"W&B offline: `wandb sync {directory}/wandb/offline-run-*` sends it later")

    def sample(self, time_s: float, values: Mapping[str, float | None]) -> None:
        """The state at a moment of the run."""
        if self._run is not None:
            self._run.log({"time_s": time_s} | {key: value for key, value in values.items() if value is not None})

    def finish(self, directory: Path) -> None:
        """Everything that came out; the run ends."""
        if self._run is None:
            return
        import wandb

        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        self._run.summary.update(dict(_flat(summary)))
        logged: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in sorted(directory.glob("*.png"))}
        if rows := list(_first_lines(directory / "requests.jsonl", _MAX_ROWS)):
            columns = list(rows[0])
            table = wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])
            logged["requests"] = table
        if logged:
            self._run.log(logged)
        artifact = wandb.Artifact(f"run-{self._run.id}", type="run-directory")
        for name in _ARTIFACT_FILES:
            if (directory / name).is_file():
                artifact.add_file(str(directory / name))
        self._run.log_artifact(artifact)
        self._run.finish()

    def fail(self) -> None:
        """The run ended before its end."""
        if self._run is not None:
            self._run.finish(exit_code=1)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{key}", value


def _first_lines(path: Path, count: int) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as stream:
            for _, line in zip(range(count), stream, strict=False):
                yield json.loads(line)


def _netrc() -> str:
    try:
        return (Path.home() / ".netrc").read_text(encoding="utf-8")
    except OSError:
        return ""
