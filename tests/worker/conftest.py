"""A tiny random checkpoint, and ranks that run it in this process."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.cluster.messages import NewRequest, RankReady, RankStep, StepDone
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import BlockPool, Extent, num_blocks_for
from megatron_medha.core.kv.ops import KVOp, append_op, drop_op
from megatron_medha.core.sampling import Sampling

BLOCK_SIZE = 16


class Front:
    """Stands in for the front process: hands out blocks, numbers batches, forms steps for one rank."""

    def __init__(self, rank: Any, ready: RankReady) -> None:
        self.rank, self.ready = rank, ready
        self.pool = BlockPool(ready.num_blocks)
        self.num_batches = 0
        self.kv_ops: list[KVOp] = []  # for the next batch
        self.kv_ops_sent: tuple[KVOp, ...] = ()  # with the last one that had any

    def new(self, request_id: str, token_ids: Sequence[int], *, num_prompt_tokens: int | None = None, **sampling: Any):
        """A NewRequest; greedy unless told otherwise."""
        parameters = Sampling(**{"max_output_tokens": 100, "temperature": 0.0, **sampling})
        count = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
        return NewRequest(request_id, array("i", token_ids).tobytes(), count, parameters)

    def first(self, request_id: str, num_tokens: int, *, room: int, samples: bool = False) -> Chunk:
        """A chunk from position 0, in new blocks for `room` tokens, which come with the next batch."""
        self.kv_ops.append(drop_op(request_id))
        self.append(request_id, num_blocks_for(room, BLOCK_SIZE))
        return Chunk(request_id, 0, num_tokens, samples)

    def append(self, request_id: str, num_blocks: int) -> tuple[Extent, ...]:
        """Blocks for a request, that come with the next batch."""
        extents = self.pool.allocate(num_blocks)
        assert extents is not None
        self.kv_ops.append(append_op(request_id, 0, extents))
        return extents

    def step(
        self, chunks: Sequence[Chunk] = (), new: Sequence[NewRequest] = (), released: Sequence[str] = ()
    ) -> StepDone:
        """Run one batch."""
        self.num_batches += 1
        kv_ops, self.kv_ops = tuple(self.kv_ops), []
        self.kv_ops_sent = kv_ops or self.kv_ops_sent
        done = self.rank.run(RankStep(self.num_batches, tuple(chunks), tuple(new), tuple(released), kv_ops=kv_ops))
        assert done.batch_id == self.num_batches
        return done

    def generate(
        self, request_id: str, token_ids: Sequence[int], num_outputs: int, *, chunk: int = 1000, **sampling: Any
    ) -> list[int]:
        """Prefill in chunks, decode alone, release; the output tokens."""
        new = [self.new(request_id, token_ids, **sampling)]
        total = len(token_ids)
        outputs: list[int] = []
        for start in range(0, total, chunk):
            count = min(chunk, total - start)
            is_last = start + count == total
            piece = (
                self.first(request_id, count, room=total + num_outputs, samples=is_last)
                if start == 0
                else Chunk(request_id, start, count, is_last)
            )
            done = self.step([piece], new if start == 0 else ())
            outputs += [token.token_id for token in done.tokens]
        while len(outputs) < num_outputs:
            done = self.step([Chunk(request_id, total + len(outputs) - 1, 1, True)])
            outputs += [token.token_id for token in done.tokens]
        self.step(released=[request_id])
        return outputs


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model and the directory it was saved to."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture(scope="session")
def rank_config(theirs: tuple[Any, Path]) -> RankConfig:
    """How the tests' ranks start."""
    return RankConfig(
        server_endpoint="inproc://nobody",
        checkpoint=str(theirs[1]),
        model=ModelOptions(device="cpu", block_size=BLOCK_SIZE, num_threads=1),
        kv_memory_bytes=8 << 20,
    )


@pytest.fixture(scope="session")
def front_of() -> Callable[[RankConfig], Front]:
    """Starts a rank in this process, and the front it answers to."""
    from megatron_medha.worker.startup.load import load_rank

    return lambda config: Front(*load_rank(config, lambda what, fraction: None))


@pytest.fixture
def front(rank_config: RankConfig, front_of: Callable[[RankConfig], Front]) -> Front:
    """A fresh rank with the tiny checkpoint."""
    return front_of(rank_config)
