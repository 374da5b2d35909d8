"""A rank that computes decodes before it is asked says exactly what one says that does not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from megatron_medha.cluster.messages import StepDone
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op, drop_op
from megatron_medha.kernels.native_build import NativeUnavailable, native_library

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "seed": 7, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "num_logprobs": 2},
    {"temperature": 1.2, "seed": 3, "min_output_tokens": 6, "stop_token_ids": tuple(range(200))},
)


class Walk:
    """A front's life with one rank: requests come, decode, end by length or stop, are aborted, lose their KV."""

    def __init__(self, front: Any, name: str, seed: int, *, runs_ahead: bool) -> None:
        self.front, self.name, self.runs_ahead = front, name, runs_ahead
        self.random = random.Random(seed)
        self.prompts: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.limits: dict[str, int] = {}
        self.blocks: dict[str, int] = {}
        self.samplings: dict[str, dict[str, Any]] = {}
        self.released: list[str] = []
        self.num_ahead = 0
        self.said: list[Any] = []

    def run(self, num_steps: int) -> list[Any]:
        for step in range(num_steps):
            chunks, new = [], []
            if self.random.random() < 0.3 and len(self.prompts) < 5:
                chunks, new = self.arrival(f"{self.name}-{step}")
            if self.prompts and self.random.random() < 0.1:
                self.end(self.random.choice(list(self.prompts)))  # its client has gone
            elif self.prompts and self.random.random() < 0.1 and not new:
                chunks, new = self.lost_kv(self.random.choice(list(self.prompts)))
            begun = {chunk.request_id for chunk in chunks}
            chunks = [chunk for chunk in chunks if chunk.request_id in self.prompts]
            chunks += [self.decode(request_id) for request_id in self.prompts if request_id not in begun]
            new = [one for one in new if one.request_id in self.prompts]
            self.random.shuffle(chunks)
            done: StepDone = self.front.step(chunks, new, self.released)
            self.released = []
            self.take(done)
            if self.runs_ahead:
                self.num_ahead += self.front.rank.run_ahead()
        self.front.step(released=[*self.prompts, *self.released])
        return self.said

    def arrival(self, request_id: str) -> tuple[list[Chunk], list[Any]]:
        length = self.random.randint(1, 40)
        self.prompts[request_id] = [self.random.randrange(4, 512) for _ in range(length)]
        self.outputs[request_id] = []
        self.limits[request_id] = self.random.randint(1, 25)
        self.samplings[request_id] = self.random.choice(SAMPLINGS)
        return self.whole(request_id)

    def lost_kv(self, request_id: str) -> tuple[list[Chunk], list[Any]]:
        self.released.append(request_id)
        return self.whole(request_id)

    def whole(self, request_id: str) -> tuple[list[Chunk], list[Any]]:
        prompt, tokens = self.prompts[request_id], self.prompts[request_id] + self.outputs[request_id]
        sampling = {**self.samplings[request_id], "max_output_tokens": self.limits[request_id]}
        new = self.front.new(request_id, tokens, num_prompt_tokens=len(prompt), **sampling)
        # Room for what it has, so that the next block comes with a decode.
        self.blocks[request_id] = -(-len(tokens) // 16)
        return [self.front.first(request_id, len(tokens), room=len(tokens), samples=True)], [new]

    def decode(self, request_id: str) -> Chunk:
        start = len(self.prompts[request_id]) + len(self.outputs[request_id]) - 1
        # Its block comes with the token that needs it, or with the one before.
        num_blocks = self.blocks[request_id]
        is_due = start == 16 * num_blocks or start == 16 * num_blocks - 1 and self.random.random() < 0.5
        self.blocks[request_id] += is_due
        if is_due:
            self.grow(request_id)
        return Chunk(request_id, start, 1, True)

    def grow(self, request_id: str) -> None:
        self.front.append(request_id, 1)

    def take(self, done: StepDone) -> None:
        assert not done.failed
        # Requests of two walks bear the number of the step they came in.
        said = ((one.request_id.split("-")[1], one.token_id, one.is_stop, one.logprobs) for one in done.tokens)
        self.said += sorted(said, key=lambda one: one[0])
        for token in done.tokens:
            self.outputs[token.request_id].append(token.token_id)
            if token.is_stop or len(self.outputs[token.request_id]) == self.limits[token.request_id]:
                self.end(token.request_id)

    def end(self, request_id: str) -> None:
        self.released.append(request_id)
        self.front.kv_ops = [op for op in self.front.kv_ops if op.request_id != request_id]
        del self.prompts[request_id], self.outputs[request_id]


@pytest.mark.parametrize("seed", range(4))
def test_running_ahead_changes_no_token(front: Any, seed: int) -> None:
    expected = Walk(front, "plain", seed, runs_ahead=False).run(60)
    ahead = Walk(front, "ahead", seed, runs_ahead=True)
    assert ahead.run(60) == expected
    assert len(expected) > 60 and ahead.num_ahead > 20  # both were worth the name


@pytest.fixture
def native_front(rank_config: RankConfig, front_of: Callable[[RankConfig], Any]) -> Any:
    """A rank whose whole model is one native call."""
    try:
        native_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    model = dataclasses.replace(rank_config.model, dtype="bfloat16")
    return front_of(msgspec.structs.replace(rank_config, model=model))


# Most decodes of the walk are beyond position 16, none beyond 8192.
@pytest.mark.parametrize(("num_positions", "runs_ahead"), [(16, True), (8192, True), (8192, False)])
def test_decodes_by_the_short_way_say_what_all_others_say(
    native_front: Any, num_positions: int, runs_ahead: bool
) -> None:
    rank, short_way = native_front.rank, native_front.rank._plain_decodes
    rank._plain_decodes = None
    expected = Walk(native_front, "plain", 5, runs_ahead=False).run(60)
    rank._plain_decodes, short_way._num_positions = short_way, num_positions
    walk = Walk(native_front, "short", 5, runs_ahead=runs_ahead)
    assert walk.run(60) == expected
    assert (walk.num_ahead > 20) == runs_ahead


def test_a_decode_by_the_short_way_has_the_logits_of_the_model(native_front: Any) -> None:
    rank, lengths = native_front.rank, {"a": 20, "b": 3, "c": 33}
    seen: list[torch.Tensor] = []
    best = rank._sampler.choose_greedy

    def noted(logits_RV: torch.Tensor) -> Any:
        seen.append(logits_RV.clone())
        return best(logits_RV)

    rank._sampler.choose_greedy = noted
    new = [native_front.new(name, range(4, 4 + length)) for name, length in lengths.items()]
    native_front.step([native_front.first(name, n, room=60, samples=True) for name, n in lengths.items()], new)
    assert rank.run_ahead()
    rank._held = rank._plain_decodes = None
    native_front.step([Chunk(name, length, 1, True) for name, length in lengths.items()])
    assert len(seen) == 3 and torch.equal(seen[1], seen[2])


def test_nothing_is_run_ahead_within_a_prompt_or_after_the_last_token(front: Any) -> None:
    front.step([front.first("a", 10, room=40)], [front.new("a", range(4, 24), max_output_tokens=2)])
    assert not front.rank.run_ahead()
    front.step([Chunk("a", 10, 10, True)])
    assert front.rank.run_ahead() and not front.rank.run_ahead()
    front.step([Chunk("a", 20, 1, True)])
    assert not front.rank.run_ahead()


def test_a_decode_run_ahead_is_forgotten_with_the_blocks_it_was_written_to(front: Any) -> None:
    expected = front.generate("alone", range(4, 36), 5)
    front.step([front.first("a", 32, room=48, samples=True)], [front.new("a", range(4, 36))])
    assert front.rank.run_ahead()
    # Preempted; when it begins again two of its blocks are still there, and the third is another one.
    kept = Extent(front.kv_ops_sent[-1].extents[0].first_block, 2)
    front.kv_ops += [drop_op("a"), append_op("a", 0, [kept])]
    (other,) = front.append("a", 1)
    for layer in front.rank._kv_layers:
        for pool in layer:
            pool[:, other.first_block] = torch.nan
    said = [front.step([Chunk("a", 32 + i, 1, True)]).tokens[0].token_id for i in range(4)]
    assert said == expected[1:]


def test_a_new_chunk_beside_decodes_run_ahead_is_computed_alone(front: Any) -> None:
    front.step([front.first("a", 20, room=40, samples=True)], [front.new("a", range(4, 24))])
    assert front.rank.run_ahead()
    sizes: list[int] = []
    hook = front.rank.model.register_forward_pre_hook(lambda model, args: sizes.append(args[0].shape[1]))
    done = front.step([Chunk("a", 20, 1, True), front.first("b", 7, room=40)], [front.new("b", range(4, 30))])
    hook.remove()
    assert sizes == [7] and [token.request_id for token in done.tokens] == ["a"]
