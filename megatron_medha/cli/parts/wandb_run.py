"""A simulation or benchmark in Weights & Biases: config, samples, summary, tables, plots and files of its directory."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import ConfigError, DependencyError
from megatron_medha.options.serve_options import TrackingConfig
from megatron_medha.options.yaml_text import flat
from megatron_medha.system.origin import source_commit
from megatron_medha.system.secret_values import hide_secrets

_MAX_ROWS = 10_000  # of a table of requests; W&B shows no more, and the whole is in the artifact

# Of WANDB_MODE. "dryrun" and "run" are older names of offline and online.
_WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
_MAX_REASON_CHARS = 400


def mode_of(wandb_mode: str) -> str:
    """online or offline: what the options say, else what W&B's own variable says, else whether there is a key."""
    if wandb_mode != "auto":
        return wandb_mode
    if said := os.environ.get("WANDB_MODE"):
        return said
    has_key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
    return "online" if has_key else "offline"


def check_wandb(tracking: TrackingConfig) -> None:
    """Raises DependencyError if wandb is asked for and missing, and ConfigError for what it would refuse at once."""
    if tracking.wandb_project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise DependencyError(
            f"tracking.wandb_project={tracking.wandb_project}: wandb is not installed; "
            "pip install 'megatron_medha[tracking]', or tracking=none"
        )
    mode = mode_of(tracking.wandb_mode)
    if mode not in _WANDB_MODES:
        raise ConfigError(
            f"WANDB_MODE={mode}: not one of {', '.join(_WANDB_MODES)}; change it, or set tracking.wandb_mode"
        )
    if mode in ("online", "shared", "run") and not _may_have_key():
        key = "WANDB_MODE" if tracking.wandb_mode == "auto" else "tracking.wandb_mode"
        raise ConfigError(
            f"{key}={mode}: W&B needs an API key, and there is none; run `wandb login` or set WANDB_API_KEY, "
            "or use tracking.wandb_mode=offline"
        )


@contextmanager
def wandb_errors(tracking: TrackingConfig) -> Iterator[None]:
    """Turns W&B's own errors into ConfigError: a wrong key or setting, a server that is not reached, a full disk."""
    import pydantic  # which wandb checks its settings with
    import wandb

    try:
        yield
    except (wandb.Error, pydantic.ValidationError, OSError) as error:
        why = " ".join(str(error).split())[:_MAX_REASON_CHARS] or type(error).__name__
        raise ConfigError(
            f"tracking.wandb_project={tracking.wandb_project}: W&B fails: {why}; correct that, or use "
            "tracking.wandb_mode=offline, or tracking=none"
        ) from None


def start_run(
    tracking: TrackingConfig, job_type: str, config: Mapping[str, Any], directory: Path, name: str | None = None
) -> Any:
    """A run of W&B's, as the options ask for it; its own files go into `directory`/wandb. ConfigError: W&B fails."""
    import wandb

    with wandb_errors(tracking), _words_without_secrets():
        run: Any = wandb.init(
            project=tracking.wandb_project,
            entity=tracking.wandb_entity,
            tags=list(tracking.wandb_tags) or None,
            group=tracking.wandb_group,
            job_type=job_type,
            name=name,
            mode=mode_of(tracking.wandb_mode),
            config={**config, "commit": source_commit()},
            dir=str(directory.absolute()),  # W&B's own process may have been started elsewhere
            settings=wandb.Settings(console="off", silent=True),
        )
    run.define_metric("time_s")
    run.define_metric("*", step_metric="time_s")
    return run


@contextmanager
def _words_without_secrets() -> Iterator[None]:
    # W&B records the command line among a run's metadata.
    words = sys.argv
    sys.argv = [hide_secrets(word, words) for word in words]
    try:
        yield
    finally:
        sys.argv = words


def save_artifact(run: Any, kind: str, files: Iterable[Path]) -> None:
    """Those of the files that exist, as an artifact of the run."""
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    found = [path for path in files if path.is_file()]
    for path in found:
        artifact.add_file(str(path))
    if found:
        run.log_artifact(artifact)


class WandbRun:
    """One W&B run over a run directory, or nothing at all where none is asked for."""

    def __init__(
        self, tracking: TrackingConfig, job_type: str, config: Mapping[str, Any], directory: Path, name: str
    ) -> None:
        """name: what differs from other runs; empty: its directory's. Raises what check_wandb() and begin() raise."""
        check_wandb(tracking)
        self._tracking = tracking
        self._run: Any = None
        if tracking.wandb_project is None:
            return
        # Its files go beside the results, so that a run that was made offline can be found and synced.
        self._run = start_run(tracking, job_type, config, directory, name or directory.name)
        if mode_of(tracking.wandb_mode) == "offline":
            print(f"W&B offline: `wandb sync {directory}/wandb/offline-run-*` sends it later")

    def sample(self, time_s: float, values: Mapping[str, float | None]) -> None:
        """The state at a moment of the run."""
        if self._run is not None:
            self._run.log({"time_s": time_s} | {key: value for key, value in values.items() if value is not None})

    def finish(self, directory: Path) -> None:
        """Everything that came out; the run ends. ConfigError: W&B fails."""
        if self._run is not None:
            with wandb_errors(self._tracking):
                self._log_results(directory)
                self._run.finish()

    def fail(self) -> None:
        """The run ended before its end."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def _log_results(self, directory: Path) -> None:
        import wandb

        summary = flat(json.loads((directory / "summary.json").read_text(encoding="utf-8")))
        self._run.summary.update({key: one for key, one in summary.items() if isinstance(one, int | float | str)})
        logged: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in sorted(directory.glob("*.png"))}
        if (requests := directory / "requests.jsonl").is_file():
            with requests.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in islice(lines, _MAX_ROWS)]
            columns = list(rows[0]) if rows else []
            table = wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])
            logged["requests"] = table
        if logged:
            self._run.log(logged)
        files = [path for path in sorted(directory.iterdir()) if path.suffix != ".png"]
        save_artifact(self._run, "run-directory", files)


def _netrc() -> str:
    try:
        return (Path(os.environ.get("NETRC") or Path.home() / ".netrc")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _may_have_key() -> bool:
    # Which host's key it takes is W&B's business. On a terminal it asks for one.
    is_set = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return is_set or "password" in _netrc() or sys.stdin.isatty()
