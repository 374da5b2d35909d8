"""Attention over shards, merged in the tree of partitions, has the bits of attention over all keys."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_targets import TARGETS, native_of
from torch import Tensor

from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import LayerKV, QueryRange
from megatron_medha.kernels.attention.merge_tree import shard_nodes
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.attention.native_shards import NativeShards, SharedChunk
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.native_build import usable_targets
from megatron_medha.worker.windows import windowed_ranges

DTYPES = [torch.float32, torch.bfloat16]
BLOCK_SIZE, K, G = 16, 2, 3


@dataclass
class Sequence:
    """One sequence's numbers, and where its keys lie: shard i on ranks[i]."""

    q_TKGD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    ranks: tuple[int, ...]
    tables: list[SlotTable]


class ShardedWorld:
    """The same sequences on one rank and on several, with pools of their own."""

    def __init__(
        self, backend: NativeAttention, *, dtype: torch.dtype, head_dim: int, num_ranks: int, shard_tokens: int,
        num_tokens: int, rng: random.Random, num_sequences: int = 1,
    ) -> None:  # fmt: skip
        self.backend, self.shard_tokens, self.num_ranks = backend, shard_tokens, num_ranks
        self.scale = head_dim**-0.5
        num_blocks = num_sequences * (max(num_tokens, shard_tokens) // BLOCK_SIZE + 1)
        self.layers = [self._pool(num_blocks, head_dim, dtype) for _ in range(num_ranks + 1)]  # the last has all keys
        self.sequences = []
        num_shards = -(-num_tokens // shard_tokens)
        assert num_shards <= num_ranks
        used = [0] * (num_ranks + 1)
        for _ in range(num_sequences):
            k_TKD, v_TKD = (torch.randn(num_tokens, K, head_dim).to(dtype) for _ in range(2))
            tables = []
            ranks = tuple(rng.sample(range(num_ranks), num_shards))
            for place, tokens in [*((rank, shard_tokens) for rank in ranks), (num_ranks, num_tokens)]:
                table = SlotTable(BLOCK_SIZE)
                count = -(-tokens // BLOCK_SIZE)
                table.append([(used[place], count)])
                used[place] += count
                tables.append(table)
            q_TKGD = torch.randn(num_tokens, K, G, head_dim).to(dtype)
            self.sequences.append(Sequence(q_TKGD, k_TKD, v_TKD, ranks, tables))

    def _pool(self, num_blocks: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
        layer = self.backend.allocate(num_blocks, BLOCK_SIZE, K, head_dim, dtype)
        for values in layer:
            values.fill_(torch.nan)  # what is read unwritten shows
        return layer

    def alone(self, sequence: Sequence, start: int, count: int, window: int | None) -> Tensor:
        """Rows of one sequence over all its keys."""
        rows = slice(start, start + count)
        ranges = [QueryRange(0, count, start, sequence.tables[-1])]
        if window is not None:
            ranges = list(windowed_ranges(ranges[0], start, 0, window))
        numbers = (sequence.q_TKGD[rows], sequence.k_TKD[rows], sequence.v_TKD[rows])
        return self.backend.attend(self.backend.plan(ranges), *numbers, self.layers[-1], self.scale)

    def shared(self, work: list[tuple[Sequence, int, int]], window: int | None) -> list[Tensor]:
        """A batch of rows of several sequences: out_THD of each, the same on all its ranks."""
        chunks_of: dict[int, list[int]] = {}
        for index, (sequence, start, _) in enumerate(work):
            for rank in sequence.ranks[: start // self.shard_tokens + 1]:
                chunks_of.setdefault(rank, []).append(index)
        begun = {rank: self._begin(rank, [work[i] for i in indices], window) for rank, indices in chunks_of.items()}
        outs: list[list[Tensor]] = [[] for _ in work]
        for rank, (shards, pending, _) in begun.items():
            arrived = {}
            for other, (_, theirs, of_chunks) in begun.items():
                both = [of_chunks[chunks_of[other].index(i)] for i in chunks_of[rank] if i in chunks_of[other]]
                if other != rank and both:
                    arrived[other] = torch.cat([theirs.nodes_NHE[rows] for rows in both])
            shards.merge_arrived(pending, arrived)
            row = 0
            for index in chunks_of[rank]:
                count = work[index][2]
                outs[index].append(pending.out_THD[row : row + count])
                row += count
        for found in outs:
            assert all(torch.equal(found[0], other) for other in found[1:]), "ranks have different outputs"
        return [found[0] for found in outs]

    def _begin(self, rank: int, work: list[tuple[Sequence, int, int]], window: int | None):
        ranges, chunks, results, row, size = [], [], [], 0, self.shard_tokens
        for sequence, start, count in work:
            last = start // size
            nodes = [
                shard_nodes(shard * size, (shard + 1) * size, start + count, self.backend.partition_tokens)
                for shard in range(last + 1)
            ]
            shard = sequence.ranks.index(rank)
            found = QueryRange(
                row, count, start - last * size if shard == last else size, sequence.tables[shard], shard == last,
                shard * size, nodes[shard],
            )  # fmt: skip
            ranges += [found] if window is None else windowed_ranges(found, start, shard * size, window)
            chunks.append(SharedChunk(row, count, tuple(zip(sequence.ranks, nodes))))
            first = results[-1].stop if results else 0
            results.append(slice(first, first + count * len(nodes[shard])))
            row += count
        shards = NativeShards(self.backend, self.backend.plan(ranges), rank, None, chunks)
        numbers = [
            torch.cat([getattr(sequence, name)[start : start + count] for sequence, start, count in work])
            for name in ("q_TKGD", "k_TKD", "v_TKD")
        ]
        pending = shards.begin(*numbers, self.layers[rank], self.scale)
        shards.attend(pending)
        return shards, pending, results


def chunks_of(num_tokens: int, shard_tokens: int, rng: random.Random, most: int) -> Iterator[tuple[int, int]]:
    """A prompt in chunks that do not cross the end of a shard."""
    start = 0
    while start < num_tokens:
        left = min(num_tokens - start, shard_tokens - start % shard_tokens)
        count = min(left, rng.choice((1, 1, rng.randint(1, most))))
        yield start, count
        start += count


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from(TARGETS), st.sampled_from([16, 40, 64]),
    st.sampled_from([16, 32, 48, 144]), st.integers(1, 7), st.sampled_from([2, 4]), st.booleans(),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_shards_of_whole_partitions_have_the_bits_of_one_rank(
    dtype: torch.dtype, target: str, head_dim: int, partition_tokens: int, partitions_each: int, num_ranks: int,
    is_windowed: bool, rng: random.Random,
) -> None:  # fmt: skip
    if target.replace("AMX_PLAIN", "AVX512") not in usable_targets():
        return
    backend = NativeAttention(target)
    backend.partition_tokens = partition_tokens
    shard_tokens = partition_tokens * partitions_each
    num_tokens = rng.randint(1, min(600, num_ranks * shard_tokens))
    torch.manual_seed(rng.randrange(1 << 30))
    world = ShardedWorld(
        backend, dtype=dtype, head_dim=head_dim, num_ranks=num_ranks, shard_tokens=shard_tokens,
        num_tokens=num_tokens, rng=rng, num_sequences=2,
    )  # fmt: skip
    window = rng.randint(1, num_tokens) if is_windowed else None
    alone = [
        torch.cat([world.alone(s, *chunk, window) for chunk in chunks_of(num_tokens, num_tokens, rng, 300)])
        for s in world.sequences
    ]
    # Sequences advance by chunks of their own, side by side or not.
    waiting = [[(s, *chunk) for chunk in chunks_of(num_tokens, shard_tokens, rng, 200)] for s in world.sequences]
    while any(waiting):
        step = [(index, left.pop(0)) for index, left in enumerate(waiting) if left and rng.random() < 0.8]
        for (index, (_, start, count)), out_THD in zip(step, world.shared([work for _, work in step], window)):
            assert torch.equal(out_THD, alone[index][start : start + count]), (index, start, count)


@pytest.mark.parametrize(("dtype", "target"), [(torch.float32, "AVX512"), (torch.bfloat16, "AMX")])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_long_shards_that_are_cut_among_threads_have_the_bits_of_one_rank(
    dtype: torch.dtype, target: str, num_threads: int
) -> None:
    backend, threads = native_of(target), torch.get_num_threads()
    backend.partition_tokens = 128
    rng = random.Random(0)
    torch.manual_seed(0)
    world = ShardedWorld(
        backend, dtype=dtype, head_dim=64, num_ranks=2, shard_tokens=128 * 25, num_tokens=5000, rng=rng
    )
    (sequence,) = world.sequences
    expected = torch.cat([world.alone(sequence, *chunk, None) for chunk in [(0, 2500), (2500, 2499), (4999, 1)]])
    try:
        torch.set_num_threads(num_threads)
        for start, count in [(0, 3200), (3200, 1000), (4200, 799), (4999, 1)]:
            (out_THD,) = world.shared([(sequence, start, count)], None)
            assert torch.equal(out_THD, expected[start : start + count])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shard_tokens", [48, 80])
def test_shards_that_end_within_a_partition_are_close(shard_tokens: int) -> None:
    backend = native_of("AVX2")
    backend.partition_tokens = 64
    torch.manual_seed(0)
    world = ShardedWorld(
        backend, dtype=torch.float32, head_dim=16, num_ranks=4, shard_tokens=shard_tokens, num_tokens=190,
        rng=random.Random(1),
    )  # fmt: skip
    (sequence,) = world.sequences
    expected_THD, _ = reference.attention(
        sequence.q_TKGD.flatten(1, 2), sequence.k_TKD, sequence.v_TKD, world.scale, is_causal=True
    )
    for start, count in chunks_of(190, shard_tokens, random.Random(2), 60):
        (out_THD,) = world.shared([(sequence, start, count)], None)
        torch.testing.assert_close(out_THD.double(), expected_THD[start : start + count], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("first", "end", "num_seen", "expected"),
    [
        (0, 64, 1000, [0]),                   # a power of two is one node
        (64, 128, 1000, [4]),
        (0, 80, 1000, [0, 4]),                # 5 partitions
        (80, 160, 1000, [5, 6, 8]),
        (80, 160, 97, [5, 6]),                # nobody sees the third
        (80, 160, 80, [5]),
        (40, 72, 1000, [2, 4]),               # the border lies in a partition: both shards have it
    ],
)  # fmt: skip
def test_a_shard_is_made_of_the_largest_nodes_of_the_tree(
    first: int, end: int, num_seen: int, expected: list[int]
) -> None:
    assert np.array_equal(shard_nodes(first, end, num_seen, 16), expected)
    assert len(shard_nodes(first * 1024 + 16, end * 1024 + 16, 1 << 40, 16)) <= 2 * 12


def test_results_without_places_for_nodes_are_refused() -> None:
    backend = native_of("AVX2")
    layer, table = backend.allocate(2, BLOCK_SIZE, 1, 16, torch.float32), SlotTable(BLOCK_SIZE)
    table.append([(0, 2)])
    plan = backend.plan([QueryRange(0, 1, 4, table, node_starts=np.array([0]))])
    with pytest.raises(ValueError, match="1 results of nodes"):
        backend.attend(plan, torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), layer, 1.0)
