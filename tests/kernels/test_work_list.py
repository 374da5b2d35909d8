"""Work lists: every row meets every key it sees exactly once, and programs end together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.kernels.attention.work_list import NO_RUN, RUN_COLUMN, RowRange, WorkList, note_runs, work_list
from megatron_medha.kernels.kv.slot_table import SlotTable

HEADS = 8


def cut(lengths: list[tuple[int, int]], num_programs: int = 132, block_n: int = 64, is_causal: bool = True) -> WorkList:
    """lengths: (rows, keys before them)."""
    ranges, row = [], 0
    for index, (rows, start) in enumerate(lengths):
        ranges.append(RowRange(row, rows, start if is_causal else start - 1, int(is_causal), index))
        row += rows
    return work_list(ranges, tokens_per_tile=16, block_n=block_n, num_kv_heads=HEADS, num_programs=num_programs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 5000)), min_size=1, max_size=5),
    st.integers(1, 300),
    st.booleans(),
)
def test_items_cover_every_key_of_every_row_once(
    lengths: list[tuple[int, int]], num_programs: int, is_causal: bool
) -> None:
    work = cut(lengths, num_programs, is_causal=is_causal)
    covered: dict[int, list[tuple[int, int]]] = {}
    parts = []
    for first_row, rows, last_key, step, begin, end, _, part, *_ in work.items_NI.tolist():
        assert begin % 64 == 0
        parts += [part] if part >= 0 else []
        for row in range(first_row, first_row + rows):
            seen = last_key + step * (row - first_row) + 1
            covered.setdefault(row, []).append((begin, min(end, max(seen, begin))))
    row = 0
    for rows, start in lengths:
        for offset in range(rows):
            pieces = sorted(covered[row])
            ends = [0, *(end for _, end in pieces)]
            wanted = start + offset + 1 if is_causal else start
            assert max(ends) == wanted
            assert all(begin <= end for begin, end in pieces)
            full = [piece for piece in pieces if piece[0] < wanted]
            assert all(a[1] == b[0] for a, b in zip(full, full[1:], strict=False))
            row += 1
    assert sorted(parts) == list(range(work.num_parts))
    merged = [first + i for _, _, first, count in work.merges_MI.tolist() for i in range(count)]
    assert sorted(merged) == list(range(work.num_parts))


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([(64, 100_000)], id="a small chunk over a long prefix"),
        pytest.param([(1, 1_000_000)], id="one long decode"),
        pytest.param([(1, 1_000_000), *[(1, 1_000)] * 31], id="one long decode among short ones"),
        pytest.param([(128, 32_000), *[(1, 8_000)] * 16], id="mixed"),
    ],
)
def test_programs_end_within_a_tenth_of_one_another(lengths: list[tuple[int, int]]) -> None:
    work = cut(lengths)
    blocks = -(-(work.items_NI[:, 5] - work.items_NI[:, 4]) // 64)
    ideal = blocks.sum() * HEADS / 132
    busy = np.zeros(132)
    for size in np.repeat(np.sort(blocks)[::-1], HEADS):  # as the hardware hands them out
        busy[busy.argmin()] += size
    assert busy.max() <= 1.1 * ideal + 4


@pytest.mark.parametrize("others", [[], [(1, 70_000)], [(300, 4000), (1, 5)]])
def test_fixed_partitions_are_cut_where_they_are_whatever_else_is_in_the_batch(others: list[tuple[int, int]]) -> None:
    ranges = [RowRange(0, 20, 9_000, 1, 0), *(RowRange(20 + i, 1, keys, 0, 1) for i, (_, keys) in enumerate(others))]
    work = work_list(
        ranges, tokens_per_tile=16, block_n=64, num_kv_heads=HEADS, num_programs=132, partition_keys=1024
    )
    items = sorted((row, begin, end) for row, _, _, _, begin, end, table, *_ in work.items_NI.tolist() if table == 0)
    ends = {0: 9_016, 16: 9_020}
    expected = [(row, at, min(at + 1024, end)) for row, end in ends.items() for at in range(0, end, 1024)]
    assert items == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 3000), st.integers(1, 400), st.booleans(), st.sampled_from((None, 512)))
def test_windows_are_covered_once_and_little_else(
    rows: int, start: int, window: int, is_causal: bool, partition: int | None
) -> None:
    lowest = start + 1 - window
    ranges = [RowRange(0, rows, start if is_causal else start - 1, int(is_causal), 0, lowest)]
    work = work_list(
        ranges, tokens_per_tile=16, block_n=64, num_kv_heads=HEADS, num_programs=132, partition_keys=partition
    )
    assert work.is_windowed
    for row in range(rows):
        items = [item for item in work.items_NI.tolist() if item[0] <= row < item[0] + item[1]]
        first_row, _, last_key, step, *_, lowest_key, _ = items[0]
        assert lowest_key + row - first_row == lowest + row
        last = last_key + step * (row - first_row)
        seen = sorted(key for item in items for key in range(item[4], item[5]) if lowest + row <= key <= last)
        assert seen == list(range(max(0, lowest + row), last + 1))
        assert all(item[4] % 64 == 0 or item[4] == item[5] for item in items)
        assert min(item[4] for item in items) >= min(max(0, lowest_key) // 64 * 64, items[0][5])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 200),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_run_is_noted_where_an_items_blocks_follow_one_another_and_nowhere_else(
    extents: list[tuple[int, int]], rows: int, seed: int
) -> None:
    block_size, draw = 128, np.random.default_rng(seed)
    table, first_block = SlotTable(block_size), 1
    for gap, count in extents:
        table.append([(first_block + gap, count)])
        first_block += gap + count
    rows = min(rows, table.num_slots)
    start = int(draw.integers(0, table.num_slots - rows + 1))
    other = RowRange(rows, 40, 500, 1, 1)
    work = work_list(
        [RowRange(0, rows, start, 1, 7), other], tokens_per_tile=16, block_n=64, num_kv_heads=2, num_programs=132
    )
    assert (work.items_NI[:, RUN_COLUMN] == NO_RUN).all()
    note_runs(work, {7: table.runs_in_order()}, block_size)
    blocks = table.slots(0, table.num_slots)[::block_size] // block_size
    for item in work.items_NI.tolist():
        indexes = np.arange(item[4] // block_size, max(-(-item[5] // block_size), item[4] // block_size + 1))
        if item[6] != 7:
            assert item[RUN_COLUMN] == NO_RUN
        elif item[RUN_COLUMN] != NO_RUN:
            assert (item[RUN_COLUMN] + indexes == blocks[indexes]).all()
        else:
            assert (np.diff(blocks[indexes]) != 1).any()


def test_short_sequences_are_not_cut() -> None:
    work = cut([(1, 100), (1, 400), (30, 0)])
    assert work.num_parts == 0
    assert len(work.merges_MI) == 0


def test_no_rows_make_no_items() -> None:
    assert len(cut([]).items_NI) == 0
