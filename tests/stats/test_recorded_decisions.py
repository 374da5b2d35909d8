"""The scheduler decides what it decided when these runs were recorded (tools/record_decisions.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_medha.sim.system import build_scheduler, recorded_setup
from megatron_medha.stats.decision_log import ReplayError, read_log, replay

LOGS = sorted((Path(__file__).parent / "recorded").glob("*.jsonl.gz"))


def test_walks_and_simulations_are_recorded() -> None:
    assert len(LOGS) >= 20


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.name.partition(".")[0])
def test_a_recorded_run_replays_to_the_same_batches(path: Path) -> None:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        header, records = read_log(lines)
        assert replay(records, build_scheduler(recorded_setup(header))) > 0


def test_a_block_that_an_early_log_names_otherwise_is_found() -> None:
    with gzip.open(LOGS[0], "rt", encoding="utf-8") as stream:
        lines = list(stream)
    named = [
        (number, chunk)
        for number, line in enumerate(lines)
        for chunk, fields in enumerate(json.loads(line).get("batch", {"chunks": ()})["chunks"])
        if fields[-1]
    ]
    for number, chunk in (named[0], named[-1]):
        tampered = json.loads(lines[number])
        tampered["batch"]["chunks"][chunk][-1][0][0] += 1
        header, records = read_log([*lines[:number], json.dumps(tampered), *lines[number + 1 :]])
        with pytest.raises(ReplayError, match=f"^line {number + 1}: recorded"):
            replay(records, build_scheduler(recorded_setup(header)))


def test_a_block_that_an_early_log_does_not_name_is_found() -> None:
    with gzip.open(LOGS[0], "rt", encoding="utf-8") as stream:
        lines = list(stream)
    batches = [(i, json.loads(line)["batch"]) for i, line in enumerate(lines) if '"batch":' in line]
    number = next(i for i, batch in batches if batch["chunks"][0][-1])
    tampered = json.loads(lines[number])
    tampered["batch"]["chunks"][0][-1] = []
    header, records = read_log([*lines[:number], json.dumps(tampered), *lines[number + 1 :]])
    with pytest.raises(ReplayError, match=f"^line {number + 1}: recorded"):
        replay(records, build_scheduler(recorded_setup(header)))


def test_a_log_of_a_later_format_is_named() -> None:
    with pytest.raises(ReplayError, match="format 99 is of a later version"):
        read_log(['{"format":99,"header":{}}'])


def test_a_log_without_a_format_is_one_of_the_first() -> None:
    assert read_log(['{"header":{"a":1}}'])[0] == {"a": 1}


def test_a_renamed_option_of_the_scheduler_is_read_from_a_log_of_the_first_format() -> None:
    header, _ = read_log(['{"format":1,"header":{"config":{"policy":"lars","max_saved_gift_steps":0.5}}}'])
    assert header["config"] == {"policy": "lars", "max_banked_steps": 0.5}
