"""Rows of several kvp ranks through the native library: every rank has the merge of all parts, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import LayerKV, QueryRange
from megatron_medha.kernels.attention.merge import merge_states, with_sinks
from megatron_medha.kernels.attention.merge_tree import shard_nodes
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.attention.native_shards import NativeShards, SharedChunk
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.model import shared_attention
from megatron_medha.model.shared_attention import MergedNodes
from megatron_medha.parallel import shm_channel as shared_slots
from megatron_medha.parallel.node_exchange import NodeExchange, SharedResults
from megatron_medha.parallel.shm_channel import ShmChannel

NUM_RANKS, K, G, D, BLOCK_SIZE, PARTITION_TOKENS = 3, 2, 3, 24, 16, 16
SCALE = D**-0.5
SHARD_TOKENS = 48
NUM_SEEN = (48, 0, 21)  # keys of every request on each rank, whichever shard it is: one has nothing yet
# Chunks of a batch, by the ranks of their shards, and their rows; what a rank sends to two others need not be the same.
BATCHES = [[((0, 1, 2), 1)], [((1, 0), 2), ((0, 2), 3), ((1, 2), 1)], [((2, 0), 5), ((0, 1, 2), 4)]]
Batch = list[tuple[tuple[int, ...], int]]


def nodes_of(shard: int) -> Any:
    return shard_nodes(shard * SHARD_TOKENS, (shard + 1) * SHARD_TOKENS, 1000, PARTITION_TOKENS)


@dataclass
class OneRank:
    """What a rank has between batches. All of them are in this process, and take turns."""

    rank: int
    slots: ShmChannel
    backend: NativeAttention
    layer: LayerKV
    table: SlotTable

    def part_of(self, batch: Batch, seed: int) -> OneBatch:
        """Its rows of a batch, and its own shard of their KV."""
        ranges, chunks, results, rows, row, first_row = [], [], [], [], 0, 0
        for ranks, num_rows in batch:
            if self.rank in ranks:
                shard = ranks.index(self.rank)
                ranges.append(
                    QueryRange(
                        row, num_rows, NUM_SEEN[self.rank], self.table, False, shard * SHARD_TOKENS, nodes_of(shard)
                    )
                )
                shards = tuple((rank, nodes_of(i)) for i, rank in enumerate(ranks))
                chunks.append(SharedChunk(row, num_rows, shards))
                results.append(SharedResults(ranks, tuple(num_rows * len(nodes) for _, nodes in shards)))
                rows += range(first_row, first_row + num_rows)
                row += num_rows
            first_row += num_rows
        q_TKGD = torch.randn(first_row, K, G, D, generator=torch.Generator().manual_seed(seed))
        group: Any = SimpleNamespace(rank=lambda: self.rank)
        exchange, plan = NodeExchange(group, results, self.slots), self.backend.plan(ranges)
        native = NativeShards(self.backend, plan, self.rank, exchange.links, chunks)
        whole = self.backend.plan([found._replace(node_starts=None) for found in ranges])
        shared = MergedNodes(native, exchange)
        return OneBatch(self, rows, chunks, whole, native, shared, q_TKGD[rows].to(self.layer.k.dtype))


@dataclass
class OneBatch:
    """A rank's side of one batch."""

    rank: OneRank
    rows: list[int]  # of the batch's
    chunks: list[SharedChunk]
    whole: Any       # a plan for the outputs over this rank's keys
    native: NativeShards
    shared: MergedNodes
    q_TKGD: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, LayerKV, float]:
        none_TKD = torch.zeros(len(self.rows), K, D, dtype=self.q_TKGD.dtype)
        return self.q_TKGD, none_TKD, none_TKD, self.rank.layer, SCALE


def ranks_of(path: Path, dtype: torch.dtype) -> list[OneRank]:
    """All of a machine's, with keys and values in their shards."""
    path.write_bytes(bytes(ShmChannel.size_of(NUM_RANKS)))
    found = []
    for rank, seen in enumerate(NUM_SEEN):
        backend = NativeAttention()
        backend.partition_tokens = PARTITION_TOKENS
        layer = backend.allocate(8, BLOCK_SIZE, K, D, dtype)
        table = SlotTable(BLOCK_SIZE)
        table.append([(2, 4)])
        if seen:
            generator = torch.Generator().manual_seed(100 + rank)
            k_SKD, v_SKD = (torch.randn(seen, K, D, generator=generator).to(dtype) for _ in range(2))
            q_before = torch.zeros(seen, K, G, D, dtype=dtype)
            backend.attend(backend.plan([QueryRange(0, seen, 0, table)]), q_before, k_SKD, v_SKD, layer, SCALE)
        found.append(OneRank(rank, ShmChannel(path, rank, NUM_RANKS), backend, layer, table))
    return found


@pytest.fixture(autouse=True)
def _native() -> None:
    try:
        NativeAttention()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def expected_rows(parts: list[OneBatch], batch: Batch, sinks_H: Tensor | None = None) -> dict[int, Tensor]:
    """By row of the batch: close to it, from each rank's own output."""
    found = {}
    own = {part.rank.rank: part.rank.backend.attend_with_lse(part.whole, *part.arguments()) for part in parts}
    rows = {part.rank.rank: part.rows for part in parts}
    first_row = 0
    for ranks, num_rows in batch:
        pieces = []
        for rank in ranks:
            first = rows[rank].index(first_row)
            pieces.append(tuple(x[first : first + num_rows] for x in own[rank]))
        merged = merge_states(torch.stack([out for out, _ in pieces]), torch.stack([lse for _, lse in pieces]))
        out_THD, _ = merged if sinks_H is None else with_sinks(*merged, sinks_H)
        found |= {first_row + row: out_HD for row, out_HD in enumerate(out_THD)}
        first_row += num_rows
    return found


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_has_the_same_merge_of_all_parts_layer_after_layer(
    tmp_path: Path, dtype: torch.dtype, has_sinks: bool
) -> None:
    ranks = ranks_of(tmp_path / "slots", dtype)
    sinks_H = torch.randn(K * G) if has_sinks else None
    for seed in range(12):
        batch = BATCHES[seed % len(BATCHES)]
        parts = [rank.part_of(batch, seed) for rank in ranks if any(rank.rank in found for found, _ in batch)]
        expected = expected_rows(parts, batch, sinks_H)
        for _ in range(3):
            begun = [part.shared.begin(*part.arguments(), sinks_H) for part in parts]
            outs: dict[int, Tensor] = {}
            for part, merged in zip(parts, begun):
                for row, out_HD in zip(part.rows, merged()):
                    assert torch.equal(out_HD, outs.setdefault(row, out_HD)), (seed, part.rank.rank, row)
            # bf16 rounds twice on the other way, to 2^-9 of values below 4.
            for row, out_HD in outs.items():
                atol = 2**-6 if dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(out_HD, expected[row], rtol=0, atol=atol)


def test_what_is_too_large_for_a_slot_has_the_same_bits_another_way(tmp_path: Path) -> None:
    ranks = ranks_of(tmp_path / "slots", torch.float32)
    for batch in BATCHES:
        parts = [rank.part_of(batch, seed=7) for rank in ranks if any(rank.rank in found for found, _ in batch)]
        begun = [part.shared.begin(*part.arguments()) for part in parts]
        through_slots = [merged() for merged in begun]
        results = {}
        for part in parts:
            pending = part.native.begin(*part.arguments())
            part.native.attend(pending)
            results[part.rank.rank] = pending
        for part, expected_THD in zip(parts, through_slots):
            arrived = {
                other.rank.rank: _of_both(results[other.rank.rank].nodes_NHE, other, part)
                for other in parts
                if other is not part and set(other.rows) & set(part.rows)
            }
            pending = results[part.rank.rank]
            part.native.merge_arrived(pending, arrived)
            assert torch.equal(pending.out_THD, expected_THD)


def _of_both(nodes_NHE: Tensor, sender: OneBatch, receiver: OneBatch) -> Tensor:
    found, first = [], 0
    for chunk in sender.chunks:
        num_nodes = next(len(nodes) for rank, nodes in chunk.shards if rank == sender.rank.rank)
        end = first + chunk.num_rows * num_nodes
        if any(rank == receiver.rank.rank for rank, _ in chunk.shards):
            found.append(nodes_NHE[first:end])
        first = end
    return torch.cat(found)


def test_a_peer_that_never_answers_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_attention, "_NATIVE_WAIT_NS", 1)
    monkeypatch.setattr(shared_slots, "_SPIN_S", 0.0)
    monkeypatch.setattr(shared_slots, "_TIMEOUT_S", 0.0)
    part = ranks_of(tmp_path / "slots", torch.float32)[0].part_of(BATCHES[0], seed=0)
    with pytest.raises(TimeoutError, match="another rank has written nothing"):
        part.shared.attend(*part.arguments())


def test_what_comes_after_the_library_gave_up_waiting_is_merged_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_attention, "_NATIVE_WAIT_NS", 1)
    ranks = ranks_of(tmp_path / "slots", torch.float32)
    parts = [rank.part_of(BATCHES[0], seed=3) for rank in ranks]
    expected = expected_rows(parts, BATCHES[0])
    others: list[Any] = []
    waits = NodeExchange.wait_for_slots

    def answer_then_wait(exchange: NodeExchange) -> None:  # the others begin while this rank waits for them already
        others.extend(part.shared.begin(*part.arguments()) for part in parts[1:])
        waits(exchange)

    monkeypatch.setattr(NodeExchange, "wait_for_slots", answer_then_wait)
    out_THD = parts[0].shared.attend(*parts[0].arguments())
    assert len(others) == 2
    torch.testing.assert_close(out_THD[0], expected[0], rtol=0, atol=1e-6)
