"""The timeline of real ranks: what is in the file after a run, and after a run that lost its ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clients import TIMEOUT_S
from fake_cluster import StartCluster, assert_all_are_answered, mixed_load

from megatron_medha.cluster.run_timeline import RunTimeline
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout

Event = dict[str, Any]


def events_of(path: Path) -> list[Event]:
    events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return events


def test_every_prompt_token_is_on_every_stage_of_its_ranks(start: StartCluster, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.json"
    cluster = start(ParallelLayout(spp=2, kvp=2), shard_tokens=400, timeline=path)
    load = mixed_load(3, 12)
    for name, (prompt, num_outputs) in load.items():
        cluster.client.send(name, prompt, num_outputs)
    for name in load:
        cluster.client.wait(name)
    cluster.engine.stop(TIMEOUT_S)
    assert_all_are_answered(cluster.client, load)
    events = events_of(path)
    steps = [event for event in events if event["ph"] == "X"]
    for name, (prompt, _) in load.items():
        for stage in (0, 1):
            by_rank: dict[int, int] = {}
            for step in steps:
                for chunk in step["args"]["chunks"]:
                    if chunk["request"] == name and step["tid"] == stage and chunk["kvp_ranks"][-1] == step["pid"]:
                        by_rank[step["pid"]] = by_rank.get(step["pid"], 0) + chunk["tokens"]
            assert sum(by_rank.values()) in (len(prompt), len(prompt) - 1)  # a last token alone looks like a decode
            assert len(by_rank) == (2 if len(prompt) > 400 else 1)
    phases = {event["name"] for event in events if event["ph"] == "b"}
    assert phases == {f"{name} {phase}" for name in load for phase in ("waiting", "prefill", "decode")}
    assert {event["pid"] for event in events if event["ph"] == "C" and event["args"]["tokens"]} == {0, 1}


def test_a_run_that_lost_its_ranks_goes_on_in_the_same_timeline(start: StartCluster, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    cluster = start(ParallelLayout(spp=2), timeline=path)
    cluster.client.send("long", [4, 5, 6], 1500)
    cluster.client.wait("long", num_deliveries=3)
    cluster.kill(1)
    cluster.client.wait("long")
    cluster.engine.stop(TIMEOUT_S)
    assert cluster.engine.status.num_recoveries == 1
    events = events_of(path)
    assert {event["id"] for event in events if event["ph"] == "e"} == {"long"}
    begun = [chunk for event in events if event["ph"] == "X" for chunk in event["args"]["chunks"] if not chunk["start"]]
    assert len(begun) == 4  # on each of two stages, before the loss and after it


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "trace.json"
    with pytest.raises(ConfigError, match=f"tracking.timeline={path}: cannot be written"), RunTimeline.writing(
        path, ParallelLayout(), 0.0, 1.0
    ):
        pass
