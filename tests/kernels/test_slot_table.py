"""Slots of tokens, and their runs, against a plain list of slots."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_medha.kernels.kv.slot_table import SlotTable


def test_touching_extents_are_one_run() -> None:
    table = SlotTable(block_size=4)
    table.append([(7, 2), (9, 1)])
    assert (table.num_slots, table.num_runs) == (12, 1)


@pytest.mark.parametrize("seed", range(20))
def test_every_range_holds_exactly_its_tokens_slots(seed: int) -> None:
    random_ = random.Random(seed)
    block_size = random_.choice((1, 4, 16))
    table = SlotTable(block_size)
    plain: list[int] = []
    free = list(range(0, 200, 1))
    for _ in range(random_.randint(1, 12)):
        first = random_.choice(free)
        count = 1
        while first + count in free and random_.random() < 0.7:
            count += 1
        free = [block for block in free if not first <= block < first + count]
        table.append([(first, count)])
        plain += range(first * block_size, (first + count) * block_size)
        start = random_.randrange(len(plain))
        num_tokens = random_.randint(0, len(plain) - start)
        assert np.array_equal(table.slots(start, num_tokens), plain[start : start + num_tokens])
        assert table.slot(start) == plain[start]


def test_asking_beyond_the_blocks_is_a_bug() -> None:
    table = SlotTable(block_size=4)
    table.append([(0, 1)])
    with pytest.raises(AssertionError):
        table.slots(3, 2)
    with pytest.raises(AssertionError):
        table.slot(4)


@pytest.mark.parametrize("seed", range(5))
def test_runs_in_order_hold_every_token_and_old_views_stay_true(seed: int) -> None:
    random_ = random.Random(seed)
    table = SlotTable(4)
    slots: list[int] = []
    views: list[tuple[np.ndarray, int]] = []
    for _ in range(40):
        first, count = random_.randrange(1000), random_.randint(1, 3)
        table.append([(first, count)])
        slots += range(4 * first, 4 * (first + count))
        views.append((table.runs_in_order(), len(slots)))
    for runs, num_tokens in views:
        ends = [*runs[1:, 0].tolist(), num_tokens]
        listed = [
            slot + token - first_token
            for (first_token, slot), end in zip(runs.tolist(), ends, strict=True)
            for token in range(first_token, end)
        ]
        assert listed == slots[:num_tokens]
