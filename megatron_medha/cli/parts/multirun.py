"""`-m`: a job for every combination of values, by Hydra's own sweepers and launchers; and going on with what is left.

A job's directory is `out`/NUMBER. One that holds a summary of the same options is done: a sweep that was interrupted,
started again with the same words, runs only what is missing. Another sweep into the same `out` is refused. A job that
fails leaves its error beside its config, and the others go on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from megatron_medha.cli.parts.arguments import Arguments
from megatron_medha.cli.parts.job_words import JobWords
from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.options.compose import CONF_MODULE, Composed, as_yaml, compose, freeze
from megatron_medha.options.renamed_keys import current_values, current_words
from megatron_medha.options.yaml_text import yaml_values
from megatron_medha.system.secret_values import hide_secrets

T = TypeVar("T")
RunJob = Callable[[T, str, JobWords], dict[str, Any]]

# A job's directory is a run directory like any other, with no files of Hydra's among ours.
_HYDRA_WORDS = (
    "hydra.sweep.subdir=${hydra.job.num}",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

ERROR, SUMMARY, CONFIG, OVERRIDES = "error.txt", "summary.json", "config.yaml", "overrides.txt"
SWEEP = "sweep.txt"  # in `out`: the words of the sweep
# Words that change no job's results: how jobs are run, what is made of them.
_WITHOUT_EFFECT = ("hydra.", "hydra/", "objective=", "plots=")
_SWEEPER_PARAMS = "hydra.sweeper.params"  # an exception: values to sweep over
_HYDRA_COPY = "multirun.yaml"  # Hydra writes all words of a sweep there, keys among them
_MAX_CHECKED = 20  # of the values of one key, before the first job runs


def multirun(name: str, config_class: type[T], arguments: Arguments, run_job: RunJob[T]) -> int:
    """Run the sweep; the exit code is 1 if a job failed.

    run_job: options, their YAML and their words -> the values of summary.json; writes into options.out.
    """
    with _hydra_errors():
        parsed: list[Override] = OverridesParser.create().parse_overrides(current_words(arguments.overrides))
    given, out = _without_out(parsed)
    varied = tuple(override.get_key_element().lstrip("+") for override in given if override.is_sweep_override())
    config_dir = arguments.config_dir and arguments.config_dir.resolve()
    job = _SweepJob(name, config_class, config_dir, run_job, varied)
    _check_values(given, job)
    words = [override.input_line or "" for override in given]
    sweep = (out or Path("multirun") / f"{name}-{datetime.now():%Y-%m-%d-%H%M%S}").expanduser().absolute()
    if arguments.shows_config:
        _show(words, job, arguments.resolves_config)
        return 0
    _check_same_sweep(sweep, _identifying_overrides(given))
    _sweep(words, sweep, job)
    failed = sorted(sweep.glob(f"*/{ERROR}"), key=lambda path: path.parent.name)
    done = list(sweep.glob(f"*/{SUMMARY}"))
    print(f"{len(done)} jobs done, {len(failed)} failed; results are in {sweep}, `medha report {sweep}` compares them")
    for path in failed:
        print(f"job {path.parent.name} failed: {path.read_text(encoding='utf-8').strip()}", file=sys.stderr)
    return 1 if failed else 0


def _check_values(given: Sequence[Override], job: _SweepJob) -> None:
    """Every value of every key by itself. Raises ConfigError before any job runs."""
    ours = [one for one in given if not one.key_or_group.startswith("hydra")]
    values: dict[str, list[str]] = {}
    for one in ours:
        word = str(one.input_line)
        if _has_listed_values(one):
            found = islice(one.sweep_string_iterator(), _MAX_CHECKED)
            values[word] = [f"{word.partition('=')[0]}={value}" for value in found]
        elif not one.is_sweep_override():
            values[word] = [word]
    first = {word: several[0] for word, several in values.items()}
    for word, several in values.items():
        for value in several if len(several) > 1 else ():
            job.compose([*(first | {word: value}).values()])
    job.compose([*first.values()])


@contextmanager
def _hydra_errors() -> Iterator[None]:
    try:
        yield
    except HydraException as error:
        raise ConfigError(str(error).strip().partition("\n")[0].rstrip(".")) from error


def _sweep(words: Sequence[str], directory: Path, job: _SweepJob) -> None:
    """Run Hydra, whose own entry point reads sys.argv and ends the process on errors."""
    import hydra

    words = [f"hydra.sweep.dir={json.dumps(str(directory))}", *_HYDRA_WORDS, *words]
    if job.config_dir is not None:
        words.append(f"hydra.searchpath=[file://{job.config_dir}]")
    arguments, sys.argv = sys.argv, [f"medha {job.name}", "--multirun", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors as exceptions; main() shows them in one line
    try:
        with _hydra_errors():
            hydra.main(version_base="1.3", config_path=f"pkg://{CONF_MODULE}", config_name=job.name)(job)()
    finally:
        sys.argv = arguments
        del os.environ["HYDRA_FULL_ERROR"]
        (directory / _HYDRA_COPY).unlink(missing_ok=True)


def _show(words: Sequence[str], job: _SweepJob, resolves: bool) -> None:
    """Print the configuration of every job, as YAML documents; none is run. Raises ConfigError."""
    for word in words:
        if word.startswith("hydra/sweeper=") and not word.endswith("=basic"):
            raise ConfigError(
                f"{word} with --cfg: this sweeper chooses a job's values by what the ones before came to; "
                "leave it out, or show one job without -m"
            )
    words = [word for word in words if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    with tempfile.TemporaryDirectory() as nowhere:
        _sweep(words, Path(nowhere), dataclasses.replace(job, prints=True, resolves=resolves))


def _identifying_overrides(given: Sequence[Override]) -> list[str]:
    """The words that decide which job is which: those with several values number the jobs by their order."""
    words = [override.input_line or "" for override in given]
    counted = [
        one for one in given
        if _SWEEPER_PARAMS in str(one.input_line) or not str(one.input_line).startswith(_WITHOUT_EFFECT)
    ]  # fmt: skip
    counted.sort(key=lambda one: "" if one.is_sweep_override() else one.get_key_element())
    return [hide_secrets(_as_override(override), words) for override in counted]


def _has_listed_values(override: Override) -> bool:
    return override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP


def _as_override(override: Override) -> str:
    if _has_listed_values(override):  # whichever way it is written: a,b or choice(a,b), with spaces or without
        return f"{override.get_key_element()}={','.join(override.sweep_string_iterator())}"
    return override.input_line or ""


def _check_same_sweep(directory: Path, wanted: list[str]) -> None:
    """Raises ConfigError if `out` holds results of another sweep, or of no sweep; else writes down which one it is."""
    try:
        found: list[str] | None = current_words((directory / SWEEP).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        found = None
    if found is None and directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"out={directory}: not empty, and no sweep of this version; name another, or remove it first")
    has_jobs = any(path for kind in (CONFIG, SUMMARY, ERROR) for path in directory.glob(f"*/{kind}"))
    if found is not None and found != wanted and has_jobs:
        raise ConfigError(
            f"out={directory}: holds another sweep ({' '.join(found) or 'no overrides'}), which the same words would "
            "continue; name another directory for this one"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SWEEP).write_text("".join(f"{word}\n" for word in wanted), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={directory}: cannot be written ({error.strerror}); name another directory") from error


@dataclasses.dataclass(frozen=True)
class _SweepJob:
    """One job, wherever a launcher runs it: it may be pickled and sent to another machine."""

    name: str
    config_class: type
    config_dir: Path | None
    run_job: RunJob[Any]
    varied: tuple[str, ...]  # keys with several values
    prints: bool = False  # the configuration, and nothing is run; resolves: without ${...}
    resolves: bool = False

    def compose(self, words: Sequence[str]) -> Composed:
        """What these words of one job come to."""
        return compose(self.name, self.config_class, words, self.config_dir)

    def __call__(self, config: object) -> float:
        """Hydra's own composition is not looked at: it knows no types."""
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        directory = Path(hydra.runtime.output_dir)
        (directory.parent / _HYDRA_COPY).unlink(missing_ok=True)
        words = list(hydra.overrides.task)
        return self.run(hydra.job.num, words, hide_secrets(" ".join(words), words) or "no overrides", directory)

    def run(self, number: int, words: Sequence[str], shown: str, directory: Path) -> float:
        """Run it unless it has ended already; the figure that the sweep is after."""
        composed = self.compose(words)
        if self.prints:
            print(f"---\n# job {number}: {shown}\n{as_yaml(composed, self.resolves)}", end="")
            return 0.0
        print(f"job {number}: {shown}")
        composed.values["out"] = str(directory)
        tracking = composed.values.get("tracking")
        if tracking is not None and tracking["wandb_project"] is not None and tracking["wandb_group"] is None:
            tracking["wandb_group"] = directory.parent.name
        values = self._summary_of(directory, composed)
        try:
            if values is None:
                _empty(directory)
                options: Any = freeze(composed, self.config_class)
                typed = JobWords.of(self.name, words, self.varied)
                values = self.run_job(options, as_yaml(composed, resolves=True), typed)
            else:
                print(f"job {number}: already done, skipped")
                (directory / ERROR).unlink(missing_ok=True)  # it had ended, but without the figure asked for then
            lines = "".join(f"{hide_secrets(word, words)}\n" for word in words)
            (directory / OVERRIDES).write_text(lines, encoding="utf-8")
            return _objective(values, composed.values["objective"])
        except MedhaError as error:
            (directory / ERROR).write_text(hide_secrets(f"{shown}: {error}\n", words), encoding="utf-8")
            return float("nan")

    def _summary_of(self, directory: Path, composed: Composed) -> dict[str, Any] | None:
        """What this job came to earlier; None if it did not end, or only its plots are to be others.

        Raises ConfigError if it ended with other options: a sweeper may choose other values each time, and
        configuration files may have changed.
        """
        try:
            written = current_values(yaml_values((directory / CONFIG).read_text(encoding="utf-8")))
            values: dict[str, Any] = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        asked = yaml_values(as_yaml(composed, resolves=True))
        # Written without where it goes, and without secrets; what the sweep is after changes no run.
        asked["objective"] = written.get("objective")
        if {key: value for key, value in asked.items() if key in written} == written:
            return values
        written["plots"] = asked["plots"]
        if {key: value for key, value in asked.items() if key in written} == written:
            return None
        raise ConfigError(
            f"out={directory.parent}: job {directory.name} there has ended with other options; name another directory"
        )


def _objective(values: dict[str, Any], path: str) -> float:
    """The figure at a path like all.goodput_per_s. Raises ConfigError if there is none."""
    found: Any = values
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            raise ConfigError(f"objective={path}: no such figure in summary.json; at {key} there are "
                f"{', '.join(found) if isinstance(found, dict) else 'none'}")
        found = found[key]
    if not isinstance(found, int | float):
        raise ConfigError(f"objective={path}: {found!r} is not a number")
    return float(found)


def _without_out(given: Sequence[Override]) -> tuple[list[Override], Path | None]:
    """The sweep's own directory is `out`; a job's follows from it."""
    others, out = [], None
    for override in given:
        if override.get_key_element() != "out":
            others.append(override)
        elif override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: one directory for the sweep; each job gets its own in it")
        elif (value := override.value()) is not None:
            out = Path(str(value))
    return others, out


def _empty(directory: Path) -> None:
    """Remove what an interrupted job left."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
