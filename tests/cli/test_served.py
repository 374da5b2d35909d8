"""A server that lives as long as one run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_medha.cli.parts.served import ServerError, _wait_until_ready


def test_what_a_server_says_of_its_loading_is_passed_on_until_it_is_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "server.log"
    listening = "listening on http://127.0.0.1:1234 after 1.0 s; loading the model"
    log.write_text(f"{listening}\nloading: weights, 40%\nready after 9 s\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert _wait_until_ready(process, log) == "http://127.0.0.1:1234"
        process.kill()
    assert capsys.readouterr().err == "loading: weights, 40%\n"


def test_a_server_that_ends_before_it_is_ready_leaves_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("medha serve: checkpoint=nowhere: there is no such directory\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]) as process:
        process.wait()
        with pytest.raises(ServerError, match="ended with code 2; .*\n.*there is no such directory"):
            _wait_until_ready(process, log)
