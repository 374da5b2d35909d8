"""A rank without a model: its tokens follow from the tokens before them, and it checks all that it receives.

It runs worker/main.py's own loop. The checkpoint directory of its configuration may hold fault.json:
{"rank": r, "kind": "hang" | "stop" | "close" | "exit" | "lose" | "load", "token": t}. A rank that meets the token in a
prompt (for "load": when it starts) removes the file and fails that way, once. While there is a file called hold, ranks
that start wait.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from megatron_medha.cluster.messages import HeldKV, RankReady, RankStep, SampledToken, StepDone
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.layout import Coord
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.worker.main import LoadedRank, main
from megatron_medha.worker.message_inbox import MessageInbox

VOCAB_SIZE = 1000


def next_token(tokens: Sequence[int]) -> int:
    """What follows these tokens; no two different histories are likely to agree."""
    state = 7
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % 2_147_483_647
    return 3 + state % (VOCAB_SIZE - 3)


def continuation(prompt: Sequence[int], num_outputs: int) -> list[int]:
    """All that an undisturbed request gets."""
    tokens = list(prompt)
    for _ in range(num_outputs):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRank:
    """Remembers tokens and block tables as a real rank does."""

    def __init__(self, config: RankConfig, num_blocks: int) -> None:
        self._config = config
        self._coord: Coord = config.layout.coord_of(config.rank)
        self._num_blocks = num_blocks
        self._tokens: dict[str, list[int]] = {}
        self._blocks: dict[str, list[int]] = {}
        self._is_last_stage = self._coord.spp == config.layout.spp - 1
        self._last_batch_id = -1
        self._num_lost_blocks = 0  # of its books, where it has to lose some
        self.answers = self._coord.tp == 0
        self.prepared: list[str] = []  # grammars

    def run(self, step: RankStep) -> StepDone:
        assert step.batch_id > self._last_batch_id, "batches out of order"
        self._last_batch_id = step.batch_id
        for request_id in step.released:
            self._tokens.pop(request_id, None)
            self._blocks.pop(request_id, None)
        for new in step.new_requests:
            assert new.request_id not in self._tokens, f"{new.request_id} was announced twice"
            if self._is_last_stage and self.answers and new.sampling.grammar is not None:
                assert new.sampling.grammar in self.prepared, f"{new.request_id} came before its grammar"
            tokens = array("i")
            tokens.frombytes(new.token_ids)
            self._tokens[new.request_id] = list(tokens)
        for request_id, token_id in step.sampled:
            self._tokens[request_id].append(token_id)
        sampled = []
        for op in step.kv_ops:
            self._execute(op)
        for chunk in step.chunks:
            kvp_ranks, end = chunk.kvp_ranks, chunk.start + chunk.num_tokens
            assert self._coord.kvp in kvp_ranks, f"{chunk} has no part here"
            tokens = self._tokens[chunk.request_id]
            assert len(tokens) >= end, f"{chunk}: only {len(tokens)} tokens are known"
            self._fail_if_told(tokens)
            is_last = self._coord.kvp == kvp_ranks[-1]
            if is_last:
                shard_start = (len(kvp_ranks) - 1) * (self._config.max_tokens_per_shard or 0)
                num_slots = len(self._blocks[chunk.request_id]) * (self._config.model.block_size or 0)
                assert end - shard_start <= num_slots, "a token without a block"
            if chunk.samples_token:
                assert len(tokens) == end, f"{chunk}: sampled from {end} of {len(tokens)} tokens"
                if is_last and self._is_last_stage:
                    token_id = next_token(tokens)
                    sampled.append(SampledToken(chunk.request_id, token_id))
                    if self._config.layout.world_size == 1:
                        tokens.append(token_id)
        num_blocks = sum(map(len, self._blocks.values())) - self._num_lost_blocks
        audit_counts = HeldKV(len(self._tokens), num_blocks, sum(map(sum, self._blocks.values())))
        return StepDone(step.batch_id, self._config.rank, 0.001, tuple(sampled), audit_counts=audit_counts)

    def _execute(self, op: KVOp) -> None:
        if op.kind == "drop":
            if op.request_id in self._blocks:  # it may have had none here
                self._blocks[op.request_id] = []
            return
        assert op.kind == "append" and op.kvp_rank == self._coord.kvp, f"{op} is not for this rank"
        assert op.request_id in self._tokens, f"{op} is for a request that was never announced"
        given = [block for first, count in op.extents for block in range(first, first + count)]
        assert all(0 <= block < self._num_blocks for block in given)
        assert all(set(given).isdisjoint(blocks) for blocks in self._blocks.values()), "a block has two owners"
        self._blocks.setdefault(op.request_id, []).extend(given)

    def _fail_if_told(self, tokens: Sequence[int]) -> None:
        kind = _take_fault(self._config, tokens)
        match kind:
            case "hang":
                threading.Event().wait()
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "lose":
                self._num_lost_blocks += 1
            case "exit":
                os._exit(3)
            case "close":
                for found in gc.get_objects():
                    if isinstance(found, zmq.Socket) and not found.closed and found.identity.startswith(b"rank"):
                        found.close(linger=0)
                threading.Event().wait()


def _take_fault(config: RankConfig, tokens: Sequence[int] | None = None) -> str | None:
    """The fault this rank is to have now: on these tokens, or without them, while it loads."""
    path = Path(config.checkpoint) / "fault.json"
    try:
        fault = json.loads(path.read_text())
    except FileNotFoundError:  # never told, or another rank has just had it
        return None
    is_due = fault["kind"] == "load" if tokens is None else fault["kind"] != "load" and fault["token"] in tokens
    if fault["rank"] != config.rank or not is_due:
        return None
    path.unlink()
    return str(fault["kind"])


def load(config: RankConfig, progress: Callable[[str, float], None]) -> LoadedRank:
    """Takes no time, unless it has to wait or to fail."""
    progress("model", 0.5)
    while (Path(config.checkpoint) / "hold").exists():
        threading.Event().wait(0.01)
    if _take_fault(config) == "load":
        raise ValueError("told to fail")
    shape = ModelShape(
        name="fake", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=VOCAB_SIZE, max_context_len=4096,
    )  # fmt: skip
    # Ranks may differ in what they have room for; the least of all counts.
    num_blocks = config.kv_memory_bytes + config.rank
    rank = FakeRank(config, config.kv_memory_bytes)

    def serve(inbox: MessageInbox, answer: Callable[[StepDone], None]) -> None:
        while isinstance(message := inbox.wait(), RankStep):
            done = rank.run(message)
            if message.runs_ahead:
                with (Path(config.checkpoint) / f"ahead-{config.rank}").open("a") as file:
                    file.write("1")
                assert not rank.answers or inbox.poll() is None, "a step came beside one that stages go on from"
            if rank.answers:
                answer(done)

    block_size = config.model.block_size or 0
    can_run_ahead = config.layout.spp > 1 and config.layout.kvp == 1
    ready = RankReady(
        config.rank, shape, num_blocks, block_size, (), "fake", config.max_tokens_per_shard,
        can_run_ahead=can_run_ahead,
    )  # fmt: skip
    return LoadedRank(serve, ready, rank.prepared.append)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load))
