"""Decodes launched before the host has seen the tokens they follow, over graphs replayed by hand on a CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_medha.cluster.messages import RankStep
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import BlockPool, Extent
from megatron_medha.model.sampler import PendingSamples
from megatron_medha.worker.batch_tensors import HostStep, step_tensors
from tests.worker.test_run_ahead import Walk


class ByHand:
    """In place of StepGraphs: the model over a packed step, if it is small enough. Its logits are one static buffer."""

    def __init__(self, rank: Any, log: list[str], max_tokens: int = 8) -> None:
        self.rank, self.log, self.max_tokens = rank, log, max_tokens
        self.num_fed = 0
        self.logits_RV: Tensor | None = None

    def run(self, host: HostStep, token_ids_T: Tensor | None = None) -> Tensor | None:
        if host.prompt_rows or len(host.token_ids_T) > self.max_tokens:
            return None
        if token_ids_T is not None:
            assert not host.token_ids_T.any()  # the host knows none of them
            host = replace(host, token_ids_T=token_ids_T.numpy())
            self.num_fed += 1
            self.log.append("launch ahead")
        plan: Any = SimpleNamespace(num_alone=len(host.ranges), shared=())
        rank = self.rank
        tensors = step_tensors(
            host, (), plan=plan, backend=rank._backend, kv_layers=rank._kv_layers, rotary=rank._rotary,
            shards=rank.shards, staging=rank._staging,
        )  # fmt: skip
        logits_RV = rank.model(
            tensors.token_ids_1T, None, None, inference_context=tensors.batch, runtime_gather_output=True
        )[0]
        if self.logits_RV is None:
            self.logits_RV = torch.empty(self.max_tokens, logits_RV.shape[1])
        return self.logits_RV[: len(logits_RV)].copy_(logits_RV)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host does: "launch ahead", and "look" at tokens."""
    log: list[str] = []
    rows = PendingSamples.rows
    monkeypatch.setattr(PendingSamples, "rows", lambda self: log.append("look") or rows(self))
    return log


@pytest.fixture
def graphs(front: Any, log: list[str]) -> ByHand:
    """Those of the front's rank."""
    front.rank._plain_decodes = None
    front.rank.graphs = ByHand(front.rank, log)
    return front.rank.graphs


def prompts(front: Any, names: str, **sampling: Any) -> Any:
    """A step of whole prompts, with blocks for 60 tokens each."""
    new = [front.new(name, range(4 + i, 24 + i), **sampling) for i, name in enumerate(names)]
    return front.step([front.first(name, 20, room=60, samples=True) for name in names], new)


def decodes(front: Any, names: str, start: int) -> Any:
    return front.step([Chunk(name, start, 1, True) for name in names])


class WalkOverFewBlocks(Walk):
    """Blocks go from who ends to who comes, in the very next step; what was foreseen is not always asked for."""

    def __init__(self, front: Any, name: str, seed: int, *, runs_ahead: bool) -> None:
        super().__init__(front, name, seed, runs_ahead=runs_ahead)
        self.chance = random.Random(seed)
        self.owned: dict[str, list[Extent]] = {}

    def whole(self, request_id: str) -> Any:
        self.give_back(request_id)
        chunks, new = super().whole(request_id)
        self.owned[request_id] = list(self.front.kv_ops[-1].extents)
        return chunks, new

    def grow(self, request_id: str) -> None:
        self.owned[request_id] += self.front.append(request_id, 1)

    def end(self, request_id: str) -> None:
        self.give_back(request_id)
        super().end(request_id)

    def give_back(self, request_id: str) -> None:
        self.front.pool.free(self.owned.pop(request_id, []))

    def take(self, done: Any) -> None:
        if self.chance.random() < 0.1:
            self.front.rank._held = None
        super().take(done)


@pytest.mark.parametrize("seed", range(3))
def test_decodes_launched_ahead_change_no_token(front: Any, graphs: ByHand, seed: int) -> None:
    front.rank.graphs = None
    expected = Walk(front, "plain", seed, runs_ahead=False).run(60)
    front.rank.graphs = graphs
    front.pool = BlockPool(24)  # of up to five requests, of up to five blocks each
    assert WalkOverFewBlocks(front, "ahead", seed, runs_ahead=True).run(60) == expected
    assert len(expected) > 60 and graphs.num_fed > 10


def test_a_step_is_launched_before_the_tokens_it_follows_are_looked_at(
    front: Any, graphs: ByHand, log: list[str]
) -> None:
    prompts(front, "ab")
    assert log == ["launch ahead", "look"]
    for start in range(20, 24):
        log.clear()
        done = decodes(front, "ab", start)
        assert log == ["launch ahead", "look"] and len(done.tokens) == 2
        assert not front.rank.run_ahead()  # it has been
    assert graphs.num_fed == 5


def test_tokens_come_from_wherever_they_were_chosen(front: Any, graphs: ByHand, theirs: tuple[Any, Any]) -> None:
    prompts(front, "abc")
    # "c" has ended, "d" begins: the next decodes follow tokens launched ahead, not all of them, and one launched now.
    done = front.step(
        [front.first("d", 9, room=40, samples=True), Chunk("b", 20, 1, True), Chunk("a", 20, 1, True)],
        [front.new("d", range(40, 49))], ["c"],
    )  # fmt: skip
    said = {token.request_id: [token.token_id] for token in done.tokens}
    for step in range(4):
        starts = {"a": 21 + step, "b": 21 + step, "d": 9 + step}
        for token in front.step([Chunk(name, start, 1, True) for name, start in starts.items()]).tokens:
            said[token.request_id].append(token.token_id)
    assert graphs.num_fed == 6
    front.rank.graphs = None
    alone = {"a": range(4, 24), "b": range(5, 25), "d": range(40, 49)}
    assert said["d"] == front.generate("alone", alone["d"], 5)
    assert [said[name] for name in "ab"] == [front.generate("alone", alone[name], 6)[1:] for name in "ab"]


def test_a_request_that_is_not_a_number_fails_alone_and_what_followed_it_is_dropped(front: Any, graphs: ByHand) -> None:
    expected = front.generate("alone", range(5, 25), 5)
    graphs.num_fed = 0
    prompts(front, "ab")
    front.rank._kv_layers[0].k[:, front.rank._requests["a"].slot_table.slot(0) // 16] = torch.nan
    assert not decodes(front, "ab", 20).failed  # launched before
    done = decodes(front, "ab", 21)
    assert [name for name, _ in done.failed] == ["a"]
    said = [*done.tokens, *front.step([Chunk("b", 22, 1, True)], released=["a"]).tokens]
    assert [token.token_id for token in said] == expected[2:4]
    assert graphs.num_fed == 4


def test_blocks_of_a_request_that_has_stopped_may_be_anothers_in_the_next_step(front: Any, graphs: ByHand) -> None:
    first, second = front.generate("alone", range(4, 24), 2)
    assert first != second
    expected = front.generate("alone", range(30, 45), 4)
    graphs.num_fed = 0
    front.pool = BlockPool(front.ready.num_blocks)
    done = prompts(front, "a", stop_token_ids=(second,))
    assert not done.tokens[0].is_stop
    done = decodes(front, "a", 20)
    assert done.tokens[0].is_stop and graphs.num_fed == 2  # the one after it was on its way
    front.pool = BlockPool(front.ready.num_blocks)  # its blocks are the next one's
    done = front.step([front.first("a", 15, room=60, samples=True)], [front.new("a", range(30, 45))], ["a"])
    said = [done.tokens[0].token_id] + [decodes(front, "a", 15 + i).tokens[0].token_id for i in range(3)]
    assert said == expected


@pytest.mark.parametrize("sampling", [{"presence_penalty": 0.5}, {"repetition_penalty": 1.2}])
def test_what_depends_on_the_last_token_is_run_ahead_once_that_is_known(
    front: Any, graphs: ByHand, log: list[str], sampling: dict[str, Any]
) -> None:
    prompts(front, "a", **sampling)
    assert log == ["look"] and front.rank.run_ahead()
    assert log == ["look"]  # what it has launched is looked at when it is asked for


def test_nothing_is_launched_ahead_without_room_or_beside_a_step_that_has_come(front: Any, graphs: ByHand) -> None:
    front.step([front.first("a", 16, room=16, samples=True)], [front.new("a", range(4, 20))])
    assert graphs.num_fed == 0  # where its next block lies is not known
    front.step([front.first("b", 9, room=40, samples=True)], [front.new("b", range(4, 13), max_output_tokens=1)])
    assert graphs.num_fed == 0  # it has said all
    for number, name in enumerate("cd"):
        chunk, new = front.first(name, 9, room=40, samples=True), front.new(name, range(4, 13))
        front.rank.announce(RankStep(90 + number, (chunk,), (new,), kv_ops=tuple(front.kv_ops)))
        front.kv_ops.clear()
    front.rank.compute()
    assert graphs.num_fed == 0
    front.rank.compute()
    assert graphs.num_fed == 1


def test_what_fits_no_graph_is_run_ahead_when_its_tokens_are_known(front: Any, graphs: ByHand) -> None:
    graphs.max_tokens = 0
    prompts(front, "a")
    assert graphs.num_fed == 0 and front.rank.run_ahead()
