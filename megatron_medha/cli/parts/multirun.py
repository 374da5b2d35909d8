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
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict

from megatron_medha.cli.parts.arguments import Arguments
from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.options.compose import CONF_MODULE, as_yaml, freeze, register_schema, yaml_values
from megatron_medha.options.option_errors import explain
from megatron_medha.system.secret_values import hide_secrets

T = TypeVar("T")
RunJob = Callable[[T, str], dict[str, Any]]

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


def multirun(name: str, config_class: type[T], arguments: Arguments, run_job: RunJob[T]) -> int:
    """Run the sweep; the exit code is 1 if a job failed.

    run_job: options and their YAML -> the values of summary.json; writes into options.out.
    """
    try:
        given: list[Override] = OverridesParser.create().parse_overrides([*arguments.overrides])
    except HydraException as error:
        raise ConfigError(explain(error, name, config_class, ())) from error
    given, out = _without_out(given)
    words = [override.input_line or "" for override in given]
    sweep = (out or Path("multirun") / f"{name}-{datetime.now():%Y-%m-%d-%H%M%S}").expanduser().absolute()
    if arguments.shows_config:
        _show(name, config_class, arguments, words)
        return 0
    _check_same_sweep(sweep, _words_that_count(given))
    _sweep(name, config_class, arguments, words, sweep, _Job(config_class, run_job))
    failed = sorted(sweep.glob(f"*/{ERROR}"), key=lambda path: path.parent.name)
    done = list(sweep.glob(f"*/{SUMMARY}"))
    print(f"{len(done)} jobs done, {len(failed)} failed; results are in {sweep}, `medha report {sweep}` compares them")
    for path in failed:
        print(f"job {path.parent.name} failed: {path.read_text(encoding='utf-8').strip()}", file=sys.stderr)
    return 1 if failed else 0


def _sweep(
    name: str,
    config_class: type,
    arguments: Arguments,
    words: Sequence[str],
    directory: Path,
    job: Callable[[DictConfig], float],
) -> None:
    words = [f"hydra.sweep.dir={json.dumps(str(directory))}", *_HYDRA_WORDS, *words]
    if arguments.config_dir is not None:
        words.append(f"hydra.searchpath=[file://{arguments.config_dir.resolve()}]")
    register_schema(name, config_class)
    try:
        _run_hydra(name, words, job)
    except HydraException as error:
        given = OverridesParser.create().parse_overrides([*arguments.overrides])
        raise ConfigError(explain(error, name, config_class, given)) from error
    finally:
        (directory / _HYDRA_COPY).unlink(missing_ok=True)


def _show(name: str, config_class: type, arguments: Arguments, words: Sequence[str]) -> None:
    """Print the configuration of every job, as YAML documents; none is run. Raises ConfigError."""
    for word in words:
        if word.startswith("hydra/sweeper=") and not word.endswith("=basic"):
            raise ConfigError(
                f"{word} with --cfg: this sweeper chooses a job's values by what the ones before came to; "
                "leave it out, or show one job without -m"
            )
    words = [word for word in words if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    with tempfile.TemporaryDirectory() as nowhere:
        _sweep(name, config_class, arguments, words, Path(nowhere), _ShownJob(arguments.resolves_config))


@dataclasses.dataclass(frozen=True)
class _ShownJob:
    """A job whose configuration is printed instead of run."""

    resolves: bool

    def __call__(self, config: DictConfig) -> float:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = list(hydra.overrides.task)
        print(f"---\n# job {hydra.job.num}: {hide_secrets(' '.join(overrides), overrides) or 'no overrides'}")
        print(as_yaml(config, self.resolves), end="")
        return 0.0


def _words_that_count(given: Sequence[Override]) -> list[str]:
    """The words that decide which job is which: those with several values number the jobs by their order."""
    words = [override.input_line or "" for override in given]
    counted = [one for one in given if _SWEEPER_PARAMS in str(one.input_line) or not _is_without_effect(one)]
    counted.sort(key=lambda one: "" if one.is_sweep_override() else one.get_key_element())
    return [hide_secrets(_as_word(override), words) for override in counted]


def _is_without_effect(override: Override) -> bool:
    return str(override.input_line).startswith(_WITHOUT_EFFECT)


def _as_word(override: Override) -> str:
    if override.is_discrete_sweep():  # whichever way it is written: a,b or choice(a,b), with spaces or without
        return f"{override.get_key_element()}={','.join(override.sweep_string_iterator())}"
    return override.input_line or ""


def _check_same_sweep(directory: Path, wanted: list[str]) -> None:
    """Raises ConfigError if `out` holds results of another sweep, or of no sweep; else writes down which one it is."""
    try:
        found: list[str] | None = (directory / SWEEP).read_text(encoding="utf-8").splitlines()
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
class _Job:
    """One job, wherever a launcher runs it: it may be pickled and sent to another machine."""

    config_class: type
    run_job: RunJob[Any]

    def __call__(self, config: DictConfig) -> float:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        directory = Path(hydra.runtime.output_dir)
        (directory.parent / _HYDRA_COPY).unlink(missing_ok=True)
        overrides = list(hydra.overrides.task)
        print(f"job {hydra.job.num}: {hide_secrets(' '.join(overrides), overrides) or 'no overrides'}")
        with open_dict(config):
            config.out = str(directory)
            tracking = config.get("tracking")
            if tracking is not None and tracking.wandb_project is not None and tracking.wandb_group is None:
                tracking.wandb_group = directory.parent.name
        values = self._summary_of(directory, config)
        try:
            if values is None:
                _empty(directory)
                options: Any = freeze(config, self.config_class)
                values = self.run_job(options, as_yaml(config, resolves=True))
            else:
                print(f"job {hydra.job.num} is done already")
                (directory / ERROR).unlink(missing_ok=True)  # it had ended, but without the figure asked for then
            shown = "".join(f"{hide_secrets(word, overrides)}\n" for word in overrides)
            (directory / OVERRIDES).write_text(shown, encoding="utf-8")
            return _objective(values, config.objective)
        except MedhaError as error:
            what = hide_secrets(f"{' '.join(overrides)}: {error}\n", overrides)
            (directory / ERROR).write_text(what, encoding="utf-8")
            return float("nan")

    def _summary_of(self, directory: Path, config: DictConfig) -> dict[str, Any] | None:
        """What this job came to earlier; None if it did not end, or only its plots are to be others.

        Raises ConfigError if it ended with other options: a sweeper may choose other values each time, and
        configuration files may have changed.
        """
        try:
            written = yaml_values((directory / CONFIG).read_text(encoding="utf-8"))
            values: dict[str, Any] = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        asked = yaml_values(as_yaml(config, resolves=True))
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


def _run_hydra(name: str, words: Sequence[str], job: Callable[[DictConfig], float]) -> None:
    """Hydra's own entry point reads sys.argv and ends the process on errors; both are kept in here."""
    import hydra

    arguments, sys.argv = sys.argv, [f"medha {name}", "--multirun", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors as exceptions; main() shows them in one line
    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{CONF_MODULE}", config_name=name)(job)()
    finally:
        sys.argv = arguments
        del os.environ["HYDRA_FULL_ERROR"]

