"""The block tables of live sequences on the device: rows that grow by what is new, never copied as a whole.

Letters: S rows, one per live sequence; B blocks of the longest sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.kv.slot_table import SlotTable

# Growing costs every captured graph, seconds in the middle of serving; memory for a table is small beside KV.
_MIN_FIRST_ROWS = 64
_FIRST_BYTES = 64 << 20


class BlockTables:
    """int32 [S, B]. A row belongs to a SlotTable for as long as that lives."""

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        """num_blocks: of the pool; no sequence can have more, and no more sequences can have any."""
        self._block_size = block_size
        num_rows = min(num_blocks, max(_MIN_FIRST_ROWS, _FIRST_BYTES // (4 * num_blocks)))
        self.tables_SB = torch.zeros(num_rows, num_blocks, dtype=torch.int32, device=device)
        self.generation = 0  # changes when tables_SB is another tensor: captured graphs that read it are void
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._rows: weakref.WeakKeyDictionary[SlotTable, int] = weakref.WeakKeyDictionary()
        self._num_known: dict[int, int] = {}  # by row: slots whose blocks the device has been told of

    def row_of(self, table: SlotTable) -> int:
        """The sequence's row; a new one for a table not seen before."""
        row = self._rows.get(table)
        if row is None:
            if not self._free_rows:
                self._grow()
            row = self._free_rows.pop()
            self._rows[table] = row
            self._num_known[row] = 0
            weakref.finalize(table, self._free_rows.append, row)
        return row

    def news(self, tables: Iterable[SlotTable]) -> tuple[np.ndarray, np.ndarray]:
        """Places in the flattened tables (int64) and the blocks (int32) the device does not know yet; now told."""
        places, blocks = [], []
        for table in tables:
            row = self.row_of(table)
            known, size = self._num_known[row], self._block_size
            if known < table.num_slots:
                new_blocks = table.slots(known, table.num_slots - known)[::size] // size
                first = row * self.tables_SB.shape[1] + known // size
                places.append(np.arange(first, first + len(new_blocks), dtype=np.int64))
                blocks.append(new_blocks.astype(np.int32))
                self._num_known[row] = table.num_slots
        if not places:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        return np.concatenate(places), np.concatenate(blocks)

    def tell(self, places: Tensor, blocks: Tensor) -> None:
        """Write what `news` returned, once it is on the device."""
        if places.numel():
            self.tables_SB.view(-1).index_copy_(0, places, blocks)

    def _grow(self) -> None:
        old = self.tables_SB
        self.tables_SB = torch.cat((old, torch.zeros_like(old)))
        # The same list: sequences that live now give their rows back to it.
        self._free_rows.extend(range(2 * old.shape[0] - 1, old.shape[0] - 1, -1))
        self.generation += 1
