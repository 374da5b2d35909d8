"""A workload of sessions that a server's context is too short for is refused before anything is sent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_medha.bench.context_fit import check_fits
from megatron_medha.core.errors import ConfigError
from megatron_medha.workload.session_mix import SessionsConfig
from megatron_medha.workload.workload import Workload, WorkloadConfig


def drawn(length_scale: float, turns: float = 43.0) -> Workload:
    sessions = SessionsConfig(num_sessions=4, length_scale=length_scale, turns=turns)
    return Workload(WorkloadConfig(sessions=sessions), 0)


def test_sessions_that_fit_are_played() -> None:
    workload = drawn(0.01)
    check_fits(workload, 0, workload.facts.max_request_tokens)
    check_fits(workload, 0, None)


@pytest.mark.parametrize("max_tokens", [2_000, 4_096, 32_768, 131_072])
def test_sessions_that_are_too_long_are_refused_with_a_scale_that_fits(max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"^workload\.sessions\.length_scale=1: the longest turn has ") as error:
        check_fits(drawn(1.0), 0, max_tokens)
    found = re.search(r"the server takes ([\d,]+) .*; use workload\.sessions\.length_scale=(\S+)$", str(error.value))
    assert found is not None and found[1] == f"{max_tokens:,}"
    assert 0.8 * max_tokens < drawn(float(found[2])).facts.max_request_tokens <= max_tokens


def test_where_no_scale_fits_fewer_turns_are_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"use fewer turns \(workload\.sessions\.turns\)"):
        check_fits(drawn(1.0), 0, 50)


def test_sessions_of_a_file_have_no_scale(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text('{"session": "a", "prompt_tokens": 900, "output_tokens": 200}\n')
    workload = Workload(WorkloadConfig(path=path, sessions=SessionsConfig()), 0)
    check_fits(workload, 0, 1_100)
    with pytest.raises(ConfigError, match=r"^workload\.path=.*: the longest turn has 1,100 tokens .* takes 1,099 "):
        check_fits(workload, 0, 1_099)
