"""How a batch's attention is cut into items of nearly equal work, on the host, for kernels that run one item each.

A tile is a few consecutive tokens of one sequence (times the query heads of one key/value head); an item is a tile
over a range of its keys. Tiles whose keys are cut into several items leave partial results, merged afterwards.
Only numpy: the same lists are built and tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Columns of an item and of a merge, in the kernels' order.
# First row, rows, last key of the first row, step of the last key, key begin, key end, table, part, lowest key of the
# first row.
# Tenth: where the keys' blocks follow one another, the first of them less its place in the sequence; else NO_RUN.
ITEM_COLUMNS = 10
RUN_COLUMN, NO_RUN = 9, -(1 << 31)
MERGE_COLUMNS = 4  # first row, rows, first part, parts

# What an item costs besides its key blocks (prologue, writing its partial result), in key blocks of 64: a guess from
# pipeline depth (3) and the bytes of a partial tile against those of a key block; gpu_check measures whether it fits.
_ITEM_OVERHEAD_BLOCKS = 4
# Ways to cut that are compared per batch; each costs some 20 us of host time.
NUM_WAVES_TRIED = 4

_NO_WINDOW = -1  # a lowest key: no row's window begins within the table


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of the packed batch, and the keys they see: row i sees [lowest_key + i, last_key + i * step]."""

    first_row: int
    num_rows: int
    last_key: int   # of the first row; -1: it sees none
    step: int       # 1: causal; 0: every row sees the same keys
    table: int      # the sequence's row in the device's block tables
    lowest_key: int | None = None  # of the first row, in layers with a window; None: every row sees all from 0 on


@dataclass(frozen=True, slots=True)
class WorkList:
    """Items, sorted so that the largest start first and neighbours share keys; merges of what was cut."""

    items_NI: np.ndarray   # int32 [items, ITEM_COLUMNS]
    merges_MI: np.ndarray  # int32 [merges, MERGE_COLUMNS]
    num_parts: int
    makespan_blocks: float  # predicted, in key blocks per program; for comparison among lists only
    is_windowed: bool = False  # there are rows with a lowest key


def work_list(
    ranges: Sequence[RowRange],
    *,
    tokens_per_tile: int,
    block_n: int,
    num_kv_heads: int,
    num_programs: int,
    partition_keys: int | None = None,
) -> WorkList:
    """Cut so that `num_programs` running at once finish together; every item runs once per key/value head.

    partition_keys: cut at the multiples of so many keys instead, whatever else is in the batch: what is added up for a
    row, and in which order, then depends on its position alone. A multiple of block_n.
    Rows that see no key get an item with an empty range, which writes 0 and -inf.
    """
    if not ranges:
        return WorkList(np.zeros((0, ITEM_COLUMNS), np.int32), np.zeros((0, MERGE_COLUMNS), np.int32), 0, 0.0)
    is_windowed = any(r.lowest_key is not None for r in ranges)
    table = np.array(
        [
            (r.first_row, r.num_rows, r.last_key, r.step, r.table, _NO_WINDOW if r.lowest_key is None else r.lowest_key)
            for r in ranges
        ],
        dtype=np.int64,
    )
    assert not is_windowed or all(r.lowest_key is not None for r in ranges), "some rows have a window, some have none"
    tiles_T6 = _tiles(table, tokens_per_tile, is_windowed)
    first_row, rows, last_key, step, sequence, lowest_key = tiles_T6.T
    num_keys = last_key + step * (rows - 1) + 1
    end_block = -(-num_keys // block_n)
    first_block = np.minimum(np.maximum(lowest_key, 0) // block_n, np.maximum(end_block, 0))
    blocks = end_block - first_block
    if partition_keys is None:
        pieces = _num_pieces(blocks, num_kv_heads, num_programs)
        piece_blocks = -(-blocks // np.maximum(pieces, 1))
        begin_of_pieces = first_block
    else:
        assert partition_keys % block_n == 0, f"partitions of {partition_keys} keys are not blocks of {block_n}"
        piece_blocks = np.full(len(rows), partition_keys // block_n)
        begin_of_pieces = first_block // piece_blocks * piece_blocks
        pieces = np.maximum(-(-(end_block - begin_of_pieces) // piece_blocks), 1)
    tile = np.repeat(np.arange(len(rows)), pieces)
    split = np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin_block = begin_of_pieces[tile] + split * piece_blocks[tile]
    end = np.minimum((begin_block + piece_blocks[tile]) * block_n, num_keys[tile])
    begin = np.minimum(np.maximum(begin_block, first_block[tile]) * block_n, end)
    is_cut = pieces > 1
    num_parts = int(pieces[is_cut].sum())
    first_part = np.cumsum(np.where(is_cut, pieces, 0)) - np.where(is_cut, pieces, 0)
    part = np.where(is_cut[tile], first_part[tile] + split, -1)
    items = np.stack(
        (
            first_row[tile], rows[tile], last_key[tile], step[tile], begin, end, sequence[tile], part, lowest_key[tile],
            np.full(len(tile), NO_RUN),
        ),
        axis=1,
    )  # fmt: skip
    item_blocks = -(-(end - begin) // block_n) if partition_keys is not None else piece_blocks[tile]
    order = np.lexsort((tile, split, -item_blocks))
    merges = np.stack((first_row, rows, first_part, pieces), axis=1)[is_cut]
    return WorkList(
        np.ascontiguousarray(items[order], dtype=np.int32),
        np.ascontiguousarray(merges, dtype=np.int32),
        num_parts,
        _makespan(np.sort(item_blocks)[::-1], num_programs / num_kv_heads),
        is_windowed,
    )


def note_runs(work: WorkList, runs: Mapping[int, np.ndarray], block_size: int) -> None:
    """Fill in the last column of items whose keys lie in one run. runs: SlotTable.runs_in_order by the item's table."""
    for table, runs_R2 in runs.items():
        if not len(runs_R2):
            continue
        of_table = np.flatnonzero(work.items_NI[:, 6] == table)
        begin, end = work.items_NI[of_table, 4], work.items_NI[of_table, 5]
        last = np.maximum(end - 1, begin)
        run, last_run = (np.searchsorted(runs_R2[:, 0], key, "right") - 1 for key in (begin, last))
        first_token, first_slot = runs_R2[run].T
        is_one = run == last_run
        work.items_NI[of_table[is_one], RUN_COLUMN] = ((first_slot - first_token) // block_size)[is_one]


def _tiles(table_R6: np.ndarray, tokens_per_tile: int, is_windowed: bool) -> np.ndarray:
    """Ranges cut into tiles, same columns."""
    first_row, rows, last_key, step, sequence, lowest_key = table_R6.T
    counts = -(-rows // tokens_per_tile)
    owner = np.repeat(np.arange(len(rows)), counts)
    done = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens_per_tile
    return np.stack(
        (
            first_row[owner] + done,
            np.minimum(rows[owner] - done, tokens_per_tile),
            last_key[owner] + step[owner] * done,
            step[owner],
            sequence[owner],
            lowest_key[owner] + done * is_windowed,
        ),
        axis=1,
    )


def _num_pieces(blocks_T: np.ndarray, num_kv_heads: int, num_programs: int) -> np.ndarray:
    """Into how many items each tile is cut: the way with the least predicted time."""
    programs_per_head = num_programs / num_kv_heads
    longest, total = int(blocks_T.max()), int(blocks_T.sum())
    best = np.maximum(np.minimum(blocks_T, 1), 1)
    if longest <= 2 * _ITEM_OVERHEAD_BLOCKS:
        return best
    best_time = _makespan(np.sort(blocks_T)[::-1], programs_per_head)
    for unit in _units(longest, total, len(blocks_T), programs_per_head):
        pieces = np.maximum(-(-blocks_T // unit), 1)
        piece_blocks = -(-blocks_T // pieces)
        pieces = np.maximum(-(-blocks_T // np.maximum(piece_blocks, 1)), 1)  # no piece without a block
        time = _makespan(np.sort(np.repeat(piece_blocks, pieces))[::-1], programs_per_head)
        if time < best_time:
            best, best_time = pieces, time
    return best


def _units(longest: int, total: int, num_tiles: int, programs_per_head: float) -> list[int]:
    """Blocks per item worth trying: those that fill a whole number of waves."""
    units = set()
    for wave in range(1, NUM_WAVES_TRIED + 1):
        units.add(-(-total // max(1, int(programs_per_head * wave))))
        # Tiles of equal length: so many pieces each that the last wave is full.
        pieces = int(programs_per_head * wave) // num_tiles
        if pieces:
            units.add(-(-longest // pieces))
    return sorted(unit for unit in units if 2 * _ITEM_OVERHEAD_BLOCKS <= unit < longest)


def _makespan(sizes_N: np.ndarray, programs_per_head: float) -> float:
    """Blocks until the last program ends, items running in waves of equal rank; sizes descending."""
    starts = np.ceil(np.arange(len(sizes_N) / programs_per_head) * programs_per_head).astype(np.int64)
    waves = sizes_N[starts[starts < len(sizes_N)]]
    return float(waves.sum() + _ITEM_OVERHEAD_BLOCKS * len(waves))
