"""`medha models`: the families that are served, and those that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.core.errors import UnsupportedModelError
from megatron_medha.models.families.family_table import FAMILIES, NOT_SERVED
from megatron_medha.models.hf_config import read_hf_config


def test_every_family_has_a_line_with_its_traits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    served, others = capsys.readouterr().out.split("\n\n")
    lines = {line.split()[0]: line for line in served.splitlines()[1:]}
    assert set(lines) == set(FAMILIES)
    assert lines["qwen3"].split() == ["qwen3", "Llama's", "yes"]
    assert "capped scores" in lines["gemma2"] and " no " in lines["gemma2"]
    assert {line.split()[0] for line in others.splitlines()[1:]} == set(NOT_SERVED)


def test_the_list_as_json_has_the_same_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    listed = {each["model_type"]: each for each in json.loads(capsys.readouterr().out)}
    assert {name for name, each in listed.items() if each["is_served"]} == set(FAMILIES)
    assert listed["qwen3_next"]["missing"] == NOT_SERVED["qwen3_next"]


def test_no_family_is_both_served_and_not() -> None:
    assert not set(FAMILIES) & set(NOT_SERVED)


def test_another_argument_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--yaml"]) == 2
    assert "--yaml" in capsys.readouterr().err


def test_a_family_that_is_known_and_not_served_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_next"}')
    with pytest.raises(UnsupportedModelError, match="layers that keep a state"):
        read_hf_config(tmp_path)
