"""Words of a command line mean what they mean to Hydra, whichever library reads them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.override_words import read_word
from megatron_medha.options.serve_options import ServeOptions

VALUES = (
    "", "1", "-1", "+7", "0", "007", "1_000", "1__0", "1.5", ".5", "5.", "1e5", "1E-3", "-2.5e+3", "1e", "e5", "1.2.3",
    "01.5", "inf", "-inf", "NaN", "null", "NULL", "none", "true", "False", "yes", "abc", "a-b", "a.b/c", "/tmp/x", "~",
    "http://h:80", "a@b", "x%y", "a|b", "a+b", "a:b", "10:30", "'a b'", '"a,b"', "'1'", "''", "[]", "[a]", "[a,b]",
    "[ a , 1 ]", "[1,2.5,null,true]", "[[a],b]", "['a,b',c]", "[a:b]", "{a: 1}", "{a:{b:[1]}}", "a b", " a ", "a\\,b",
    "${oc.env:X}", "${a.b}", "x${a}y", "$", "*", "'a\\'b'", "a\tb", "int(3)", "str(3)", "ü", "a=b", "a(b", "[a", "[a,]",
)  # fmt: skip


@pytest.mark.parametrize("prefix", ["scheduler.policy=", "+a.b=", "++a=", "key="])
@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_what_hydra_makes_of_it(prefix: str, value: str) -> None:
    try:
        expected = OverridesParser.create().parse_override(prefix + value).value()
    except Exception:  # noqa: BLE001  # Hydra refuses it in several ways
        with pytest.raises(ConfigError, match="cannot be read"):
            read_word(prefix + value)
        return
    read = read_word(prefix + value)
    assert read.key == prefix.strip("+=")
    both_nan = isinstance(expected, float) and math.isnan(expected) and math.isnan(read.value)
    assert both_nan or (read.value == expected and type(read.value) is type(expected))


def test_usual_words_are_read_without_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra.core.override_parser.overrides_parser", None)
    for word in ("scheduler=fcfs", "server.port=8001", "checkpoint=/models/a-b_1.5", "a=0.25", "a=null"):
        read_word(word)


def test_a_name_that_looks_like_a_number_stays_as_it_was_written() -> None:
    words = ["checkpoint=007", "server.served_model_names=[405,x]", "model.dtype=auto", "server.api_key=1e50000000000"]
    options = freeze(compose("serve", ServeOptions, words), ServeOptions)
    assert str(options.checkpoint) == "007"
    assert options.server.served_model_names == ("405", "x")
    assert options.server.api_key == "1e50000000000"


def test_a_value_may_refer_to_another_key_and_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDHA_PORT", "8123")
    words = ["server.port=${oc.env:MEDHA_PORT}", "tracking.decision_log=logs/${server.port}.jsonl", "checkpoint=x"]
    options = freeze(compose("serve", ServeOptions, words), ServeOptions)
    assert options.server.port == 8123
    assert str(options.tracking.decision_log) == "logs/8123.jsonl"
    assert options.checkpoint is not None


def test_all_that_is_wrong_is_said_at_once(refusal_lines: Callable[..., list[str]]) -> None:
    wrong = refusal_lines("schedler=fcfs", "server.port=abc", "scheduler=larz")
    assert [line.partition(": ")[0] for line in wrong] == ["scheduler=larz", "schedler=fcfs", "server.port=abc"]
    wrong = refusal_lines("server.port=70000", "model.block_size=0", "scheduler.step_budget_s=-1")
    assert sorted(line.partition("=")[0] for line in wrong) == [
        "model.block_size", "scheduler.step_budget_s", "server.port",
    ]  # fmt: skip


@pytest.fixture
def refusal_lines() -> Callable[..., list[str]]:
    def lines(*words: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            freeze(compose("serve", ServeOptions, ["checkpoint=x", *words]), ServeOptions)
        return str(caught.value).splitlines()

    return lines
