"""What W&B refuses is one line with the key, the value and the way out; tried with a stand-in for wandb."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest

from megatron_medha.cli.medha import main
from megatron_medha.cli.parts.tracking import Tracking
from megatron_medha.options.serve_options import TrackingConfig

SMALL = ("parallel.spp=1", "workload.duration_s=5", "record.trace_duration_s=0", "plots=never", "seed=3")


class Settings(pydantic.BaseModel):
    console: str
    silent: bool
    mode: int = 0


class Wandb(ModuleType):
    """wandb, as far as a run needs it; `fails_with` is raised where a run begins, `ends_with` where it ends."""

    Error = type("Error", (Exception,), {})
    Settings = Settings
    fails_with: Exception | None = None
    ends_with: Exception | None = None

    def init(self, **_: Any) -> Any:
        if self.fails_with is not None:
            raise self.fails_with
        return self

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, _: Any) -> None:
        pass

    def finish(self, **_: Any) -> None:
        if self.ends_with is not None:
            raise self.ends_with


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    return module


def wrong_setting() -> Exception:
    try:
        Settings(console="off", silent=True, mode="nonsense")  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Wandb.Error("WANDB_API_KEY invalid:\nAPI key must have 40+ characters"), "40+ characters"),
        (Wandb.Error("entity nobody not found"), "nobody"),
        (OSError(28, "No space left on device"), "No space left"),
        (wrong_setting(), "mode"),
    ],
)
def test_what_wandb_refuses_at_the_start_is_one_line(
    wandb: Wandb, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception, reason: str
) -> None:
    wandb.fails_with = error
    assert main(["simulate", *SMALL, "tracking=wandb", f"out={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and "tracking.wandb_project=megatron_medha" in line and "tracking.wandb_mode=offline" in line


@pytest.mark.parametrize("name", ["a/b", "a\\\\b", "'a#b'", "why?", "50%", "'a:b'", "x" * 129, "''"])
def test_a_name_that_wandb_refuses_for_a_project_is_refused_before_anything_runs(
    wandb: Wandb, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    assert main(["simulate", *SMALL, f"tracking.wandb_project={name}", f"out={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medha simulate: tracking.wandb_project=") and "null for none" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["simulate", "bench"])
@pytest.mark.parametrize(
    ("environment", "words", "key"),
    [
        ({"WANDB_MODE": "bogus"}, (), "WANDB_MODE=bogus"),
        ({"WANDB_API_KEY": ""}, ("tracking.wandb_mode=online",), "tracking.wandb_mode=online"),
        ({"WANDB_API_KEY": "", "WANDB_MODE": "online"}, (), "WANDB_MODE=online"),
    ],
)
def test_a_mode_that_cannot_be_is_refused_before_anything_runs(
    wandb: Wandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str,
    environment: dict[str, str], words: tuple[str, ...], key: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115  no terminal on which wandb could ask
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rest = (*SMALL,) if command == "simulate" else ("url=http://127.0.0.1:9",)
    assert main([command, *rest, "tracking=wandb", *words, f"out={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"medha {command}: {key}: ") and "tracking.wandb_mode" in line
    assert not (tmp_path / "run").exists()


def test_a_server_is_served_on_where_wandb_fails(
    wandb: Wandb, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.fails_with = Wandb.Error("not reached")
    monkeypatch.setattr(logging.getLogger("megatron_medha"), "propagate", True)
    tracking = Tracking(TrackingConfig(wandb_project="mine"), None, None, {})  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR):
        tracking._run()
    (record,) = caplog.records
    assert record.exc_info is None and "not reached" in record.fields["reason"]  # type: ignore[attr-defined]
