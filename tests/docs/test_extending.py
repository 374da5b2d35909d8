"""What docs/extending.md shows works: its files are written and its commands run; `medha plan` composes only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_medha.cli.medha import main
from tests.docs.commands_in_text import commands_in

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def write_files(directory: Path) -> list[Path]:
    """The files that the page shows."""
    found = []
    for name, text in re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found.append(path)
    return found


def test_the_files_and_commands_of_the_page_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(write_files(tmp_path)) == 6
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = [command.words for command in commands_in(PAGE.read_text("utf-8"))]
    ran = [words for words in ran if words[0] in ("simulate", "explain", "replay") and "--help" not in words]
    assert len(ran) == 6
    for words in ran:
        assert main(words) == 0, words
        printed = capsys.readouterr()
        assert printed.err == "" or "%" in printed.err, printed.err
        if words[0] == "replay":
            assert "all equal: policy my_policy:short_first" in printed.out
        if words[0] == "explain":
            assert "my_policy:short_first" in printed.out


def test_a_simulated_policy_of_ones_own_orders_prompts_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_medha.core.kv.sequence import Sequence
    from megatron_medha.core.request import Request
    from megatron_medha.core.scheduling.policies import policy_named

    write_files(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = policy_named("my_policy:short_first")
    early = Request(request_id="early", num_prompt_tokens=1, max_output_tokens=1, arrival_s=0.0)
    late = Request(request_id="late", num_prompt_tokens=1, max_output_tokens=1, arrival_s=11.0)
    assert (
        policy.priority(Sequence(request=early, remaining_work_s=1.0)).at(20.0)
        < policy.priority(Sequence(request=late, remaining_work_s=0.0)).at(20.0)
    )
