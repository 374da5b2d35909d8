"""What the rows of a batch see in layers with a window: the last tokens of their sequence, as ranges of their own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_medha.kernels.attention.backend import QueryRange


def masked_range(found: QueryRange, first_position: int, shard_start: int, window: int) -> QueryRange:
    """The same rows, each of which sees `window` tokens of its sequence at most, for backends with masks_windows.

    first_position, shard_start: see `windowed_ranges`.
    """
    return found._replace(lowest_key=first_position + 1 - window - shard_start)


def windowed_ranges(found: QueryRange, first_position: int, shard_start: int, window: int) -> Iterator[QueryRange]:
    """The same rows, each of which sees `window` tokens of its sequence at most, its own included.

    first_position: of the range's first row in its sequence. shard_start: the position of the table's first token.

    Rows that the window does not cut yet stay together. Each of the others is a range over a table of its window: any
    backend that reads keys by slots takes it, and reads no other keys.
    """
    first_row, num_rows, start, table, is_written, *_ = found
    cut = max(0, window - (first_position - shard_start))  # the first row that does not see the whole table
    if cut:
        yield found._replace(num_rows=min(cut, num_rows))
    for i in range(cut, num_rows):
        lowest = first_position + i + 1 - window - shard_start
        end = start + i + 1 if is_written else start
        lowest = min(lowest, end)
        yield QueryRange(
            first_row + i, 1, end - lowest - is_written, table.part(lowest, end), is_written,
            shard_start + lowest, found.node_starts,
        )  # fmt: skip
