"""Rows of several kvp ranks through the native library: every rank has the merge of all parts, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_medha.kernels.attention.aten_attention import AtenAttention
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV, QueryRange
from megatron_medha.kernels.attention.merge import merge_states
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.attention.native_shards import native_merge
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.model import shared_attention
from megatron_medha.model.shared_attention import SharedAttention
from megatron_medha.parallel import shm_channel as shared_slots
from megatron_medha.parallel.kv_exchange import KVExchange, RankSet
from megatron_medha.parallel.shm_channel import ShmChannel

NUM_RANKS, K, G, D, BLOCK_SIZE = 3, 2, 3, 24, 16
SCALE = D**-0.5
SHARD_TOKENS = (48, 0, 21)  # of every request on each rank: one has nothing yet
# Rank sets of a batch and their rows; what a rank sends to two others need not be the same.
BATCHES = [[((0, 1, 2), 1)], [((0, 1), 2), ((0, 2), 3), ((1, 2), 1)], [((0, 2), 5), ((0, 1, 2), 4)]]


@dataclass
class OneRank:
    """What a rank has between batches. All of them are in this process, and take turns."""

    rank: int
    slots: ShmChannel
    backend: AttentionBackend
    layer: LayerKV
    table: SlotTable

    def part_of(self, batch: list[tuple[tuple[int, ...], int]], seed: int) -> OneBatch:
        """Its rows of a batch, and its own shard of their KV."""
        sets, rows, row, first_row = [], [], 0, 0
        for ranks, num_rows in batch:
            if self.rank in ranks:
                sets.append(RankSet(ranks, row, num_rows))
                rows += range(first_row, first_row + num_rows)
                row += num_rows
            first_row += num_rows
        q_TKGD = torch.randn(first_row, K, G, D, generator=torch.Generator().manual_seed(seed))
        seen = SHARD_TOKENS[self.rank]
        ranges = [QueryRange(s.first_row, s.num_rows, seen, self.table, is_written=False) for s in sets]
        plan = self.backend.plan(ranges)
        group: Any = SimpleNamespace(rank=lambda: self.rank)
        shared = SharedAttention(self.backend, plan, KVExchange(group, sets, self.slots))
        return OneBatch(self, sets, rows, plan, shared, q_TKGD[rows].to(self.layer.k.dtype))


@dataclass
class OneBatch:
    """A rank's side of one batch."""

    rank: OneRank
    sets: list[RankSet]
    rows: list[int]  # of the batch's
    plan: Any
    shared: SharedAttention
    q_TKGD: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, LayerKV, float]:
        none_TKD = torch.zeros(len(self.rows), K, D, dtype=self.q_TKGD.dtype)
        return self.q_TKGD, none_TKD, none_TKD, self.rank.layer, SCALE


def ranks_of(path: Path, make_backend: Any, dtype: torch.dtype) -> list[OneRank]:
    """All of a machine's, with keys and values in their shards."""
    path.write_bytes(bytes(ShmChannel.size_of(NUM_RANKS)))
    found = []
    for rank, seen in enumerate(SHARD_TOKENS):
        backend = make_backend()
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


@pytest.fixture
def native() -> Any:
    try:
        NativeAttention()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    return NativeAttention


def expected_rows(parts: list[OneBatch], batch: list[tuple[tuple[int, ...], int]]) -> dict[tuple[int, int], Tensor]:
    """By rank and row of the batch: the parts of all ranks, computed and merged without any exchange."""
    found = {}
    own = {part.rank.rank: part.rank.backend.attend_with_lse(part.plan, *part.arguments()) for part in parts}
    first_row = 0
    for ranks, num_rows in batch:
        pieces = []
        for rank in ranks:
            part = next(part for part in parts if part.rank.rank == rank)
            first = part.rows.index(first_row)
            pieces.append(tuple(x[first : first + num_rows] for x in own[rank]))
        backend = parts[0].rank.backend
        merged = native_merge(backend, pieces) if isinstance(backend, NativeAttention) else None
        plain, _ = merge_states(torch.stack([out for out, _ in pieces]), torch.stack([lse for _, lse in pieces]))
        if merged is not None:
            # bf16 rounds once, to 2^-9 of values below 4; fp32 sums of three terms differ in their last bits.
            torch.testing.assert_close(merged, plain, rtol=0, atol=2**-7 if merged.dtype == torch.bfloat16 else 1e-6)
        for rank in ranks:
            for row in range(num_rows):
                found[rank, first_row + row] = (plain if merged is None else merged)[row]
        first_row += num_rows
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_has_the_merge_of_all_parts_layer_after_layer(
    tmp_path: Path, native: Any, dtype: torch.dtype
) -> None:
    ranks = ranks_of(tmp_path / "slots", native, dtype)
    for seed in range(12):
        batch = BATCHES[seed % len(BATCHES)]
        parts = [rank.part_of(batch, seed) for rank in ranks if any(rank.rank in found for found, _ in batch)]
        expected = expected_rows(parts, batch)
        for _ in range(3):
            begun = [part.shared.begin(*part.arguments()) for part in parts]
            for part, merged in zip(parts, begun):
                for row, out_HD in zip(part.rows, merged()):
                    assert torch.equal(out_HD, expected[part.rank.rank, row]), (seed, part.rank.rank, row)


def test_a_rank_without_the_library_exchanges_with_ranks_that_have_it(tmp_path: Path, native: Any) -> None:
    backends = iter([native, AtenAttention, native])
    ranks = ranks_of(tmp_path / "slots", lambda: next(backends)(), torch.float32)
    parts = [rank.part_of(BATCHES[1], seed=5) for rank in ranks]
    begun = [part.shared.begin(*part.arguments()) for part in parts]
    outs = {(part.rank.rank, row): out for part, merged in zip(parts, begun) for row, out in zip(part.rows, merged())}
    expected = expected_rows(parts, BATCHES[1])
    for place, out_HD in outs.items():
        torch.testing.assert_close(out_HD, expected[place], rtol=0, atol=1e-6)


def test_a_peer_that_never_answers_is_not_waited_for_for_ever(
    tmp_path: Path, native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_attention, "_NATIVE_WAIT_NS", 1)
    monkeypatch.setattr(shared_slots, "_SPIN_S", 0.0)
    monkeypatch.setattr(shared_slots, "_TIMEOUT_S", 0.0)
    part = ranks_of(tmp_path / "slots", native, torch.float32)[0].part_of(BATCHES[0], seed=0)
    with pytest.raises(TimeoutError, match="another rank has written nothing"):
        part.shared.attend(*part.arguments())


def test_what_comes_after_the_library_gave_up_waiting_is_merged_all_the_same(
    tmp_path: Path, native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_attention, "_NATIVE_WAIT_NS", 1)
    ranks = ranks_of(tmp_path / "slots", native, torch.float32)
    parts = [rank.part_of(BATCHES[0], seed=3) for rank in ranks]
    expected = expected_rows(parts, BATCHES[0])
    others: list[Any] = []
    waits = KVExchange.wait_for_slots

    def answer_then_wait(exchange: KVExchange) -> None:  # the others begin while this rank waits for them already
        others.extend(part.shared.begin(*part.arguments()) for part in parts[1:])
        waits(exchange)

    monkeypatch.setattr(KVExchange, "wait_for_slots", answer_then_wait)
    out_THD = parts[0].shared.attend(*parts[0].arguments())
    assert len(others) == 2
    assert torch.equal(out_THD[0], expected[0, 0])
