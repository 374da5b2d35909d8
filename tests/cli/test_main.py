"""The command line as a whole: what it lists, refuses and returns. In this process, without a server."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.cli import version
from megatron_medha.cli.medha import COMMANDS, main
from megatron_medha.cli.parts.arguments import parse_arguments
from megatron_medha.cli.parts.options_help import COMMON_KEYS
from megatron_medha.cli.parts.tracking import Tracking
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.serve_options import TrackingConfig
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.system.checked_files import check_writable


def test_help_lists_every_command_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert "medha serve checkpoints/smollm2-135m-instruct" in text


def test_without_a_word_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: medha COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sevre"]) == 2
    assert "did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "chat", "train-tiny", "replay", "selftest", "check-bits"])
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: medha {name}" in text
    assert f"  medha {name}" in text


def test_help_of_serve_shows_groups_options_keys_and_comments(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--help=all"])
    text = capsys.readouterr().out
    assert "*lars " in text
    assert "vllm_chunk_512 " in text
    assert "server.port=8000 " in text
    assert "any free port" in text


def test_help_lines_fit_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--help=all"])
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 120


def test_version_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    text = capsys.readouterr().out
    assert "megatron_medha 0.1.0" in text
    assert "torch" in text


def test_a_wrong_key_ends_with_code_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "scheduler.polcy=fcfs"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "medha serve: scheduler.polcy=fcfs: unknown key; did you mean scheduler.policy?\n"
    )


def test_serve_without_a_checkpoint_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve"]) == 2
    assert "medha train-tiny" in capsys.readouterr().err


def test_cfg_job_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--cfg", "job", "scheduler=fcfs"]) == 0
    text = capsys.readouterr().out
    assert "policy: fcfs" in text
    assert "${machine:flops_per_s}" in text


def test_cfg_job_with_resolve_prints_what_references_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--cfg", "job", "--resolve"]) == 0
    text = capsys.readouterr().out
    assert "flops_per_s: " in text
    assert "${" not in text


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["--colour"], "options are written key=value"),
        (["--cfg", "hydra"], "only --cfg job"),
        (["--config-dir"], "--config-dir.*: expected one argument"),
        (["-m", "a=1,2"], "only medha simulate and medha bench"),
    ],
)
def test_a_flag_that_does_not_exist_is_refused_with_the_key_to_write(words: list[str], way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        parse_arguments(words)


def test_flags_and_overrides_may_stand_in_any_order() -> None:
    arguments = parse_arguments(["a=1", "--config-dir", "own", "b=2", "--cfg=job"])
    assert arguments.overrides == ("a=1", "b=2")
    assert arguments.config_dir == Path("own")
    assert arguments.shows_config


@pytest.mark.parametrize("url", ["localhost", "http://h:99999", "http://h:abc", "http://", "'http://[::1'"])
@pytest.mark.parametrize("words", [["chat"], ["selftest"], ["run-batch", "in", "out"]])
def test_an_address_that_is_none_is_refused(words: list[str], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, f"url={url}"]) == 2
    assert "must look like http://" in capsys.readouterr().err


def test_a_full_disk_ends_a_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(words: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(version, "run", write)
    assert main(["version"]) == 1
    assert capsys.readouterr().err == "medha version: results: No space left on device; make room, or write elsewhere\n"


def test_a_batch_whose_answers_cannot_be_written_is_refused_before_a_server_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text("{}\n")
    assert main(["run-batch", str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 2
    assert "output=" in (said := capsys.readouterr().err)
    assert "cannot be written" in said


@pytest.mark.parametrize("key", ["decision_log", "metrics_log", "timeline"])
def test_a_log_that_cannot_be_written_is_refused_before_the_model_is_loaded(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = TrackingConfig(**{key: tmp_path / "file" / "log"})  # type: ignore[arg-type]
    engine: Any = None
    with pytest.raises(ConfigError, match=f"tracking.{key}=.*: cannot be written"):
        Tracking(config, engine, Metrics(), {})


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "deep" / "new"
    old.write_text("kept")
    for path in (old, new):
        check_writable("file", path)
    assert old.read_text() == "kept"
    assert new.parent.is_dir()
    assert not new.exists()


@pytest.mark.parametrize("name", ["serve", "simulate", "plan", "bench"])
def test_the_short_help_shows_what_most_people_set_and_leads_to_the_rest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([name, "--help"])
    short = capsys.readouterr().out
    main([name, "--help=all"])
    whole = capsys.readouterr().out
    assert f"medha {name} --help=all" in short
    assert len(short.splitlines()) < 70 < len(whole.splitlines())
    missing = [key for key in COMMON_KEYS[name] if f"  {key}=" not in short]
    assert not missing


@pytest.mark.parametrize(
    ("command", "word", "meaning"),
    [
        ("serve", "checkpoints/tiny", "checkpoint=checkpoints/tiny"),
        ("serve", "Qwen/Qwen3-0.6B@main", "checkpoint=Qwen/Qwen3-0.6B@main"),
        ("serve", "my models/a", 'checkpoint="my models/a"'),
        ("profile", "checkpoints/tiny", "checkpoint=checkpoints/tiny"),
        ("train-tiny", "checkpoints/other", "directory=checkpoints/other"),
        ("fetch-model", "checkpoints/other", "out=checkpoints/other"),
        ("chat", "http://127.0.0.1:8001", "url=http://127.0.0.1:8001"),
        ("bench", "http://127.0.0.1:8001", "url=http://127.0.0.1:8001"),
    ],
)
def test_a_word_alone_is_what_the_command_is_about(command: str, word: str, meaning: str) -> None:
    assert parse_arguments([word, "seed=1"], command=command).overrides == (meaning, "seed=1")


@pytest.mark.parametrize("words", [["a", "b"], ["a", "checkpoint=b"], ["checkpoint=b", "a"]])
def test_two_checkpoints_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="several values of checkpoint; give one"):
        parse_arguments(words, command="serve")


def test_chat_without_a_server_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert main(["chat", url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"medha chat: no server at {url} (")
    assert "`medha serve DIR` starts one" in captured.err
