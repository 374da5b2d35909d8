"""Rows of the device's block tables, and the pools they point into."""

from __future__ import annotations

import pytest
import torch

from megatron_medha.kernels.kv import block_tables
from megatron_medha.kernels.kv.block_tables import BlockTables
from megatron_medha.kernels.kv.paged_kv import allocate_paged
from megatron_medha.kernels.kv.slot_table import SlotTable


def test_rows_of_sequences_that_have_ended_are_given_out_again_also_after_the_tables_grew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_tables, "_MIN_FIRST_ROWS", 2)
    monkeypatch.setattr(block_tables, "_FIRST_BYTES", 0)
    tables = BlockTables(8, 16, torch.device("cpu"))
    for _ in range(3):
        live = [SlotTable(16) for _ in range(4)]
        assert sorted(tables.row_of(table) for table in live) == [0, 1, 2, 3]
        assert [tables.row_of(table) for table in live] == [tables.row_of(table) for table in live]
        live.clear()
    assert tables.generation == 1


@pytest.mark.parametrize(("num_blocks", "num_rows"), [(8, 8), (2500, 2500), (1 << 16, 256), (1 << 24, 64)])
def test_tables_begin_with_a_row_for_every_sequence_that_can_have_a_block_while_that_is_cheap(
    num_blocks: int, num_rows: int
) -> None:
    assert BlockTables(num_blocks, 16, torch.device("meta")).tables_SB.shape == (num_rows, num_blocks)


def test_fp32_pools_are_refused_on_a_gpu_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="use model.dtype=bfloat16"):
        allocate_paged(4, 16, 2, 128, torch.float32, torch.device("cuda"))
