"""`scheduler.policy=module:function`: a policy of the user's own, tried when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.scheduling.policies import policy_named
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

MODULE = '''
from megatron_medha.core.scheduling.policies import Policy, Priority

def newest(seq):
    return Priority(-seq.request.arrival_s)

by_deadline = Policy(lambda seq: Priority(seq.deadline_s), is_by_deadline=True)

def number(seq):
    return seq.deadline_s

def nothing_known(seq):
    return Priority(float("nan"))

def broken(seq):
    return Priority(seq.arrival)
'''


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orders_of_mine.py").write_text(MODULE)
    (tmp_path / "half_a_module.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_function_or_a_policy_is_loaded_by_its_name() -> None:
    assert not policy_named("orders_of_mine:newest").is_by_deadline
    assert policy_named("orders_of_mine:by_deadline").is_by_deadline
    assert SchedulerConfig(policy="orders_of_mine:newest").policy == "orders_of_mine:newest"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orders_of_hers:newest", "there is no module orders_of_hers; install it, or run with PYTHONPATH=DIR"),
        ("orders_of_mine:oldest", "orders_of_mine has no oldest"),
        ("orders_of_mine:", "has no function named"),
        ("half_a_module:f", "importing half_a_module raised RuntimeError: no licence"),
        ("orders_of_mine:number", "it returned 2.0; a policy takes a Sequence and returns a Priority"),
        ("orders_of_mine:nothing_known", "of finite numbers"),
        ("orders_of_mine:broken", "it raised AttributeError"),
        ("orders_of_mine:MODULE", "has no MODULE"),
        (":newest", "write package.module:function"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_refused_with_key_value_and_reason(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(policy=name)
    assert f"scheduler.policy={name}: " in str(caught.value)
    assert words in str(caught.value)
