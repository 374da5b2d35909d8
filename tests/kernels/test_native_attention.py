"""The native backend: against plain attention over drawn shapes, and what it promises beyond closeness."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_targets import TARGETS, native_of
from paged_world import TOLERANCE, World

from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import QueryRange
from megatron_medha.kernels.attention.merge import with_sinks
from megatron_medha.kernels.attention.native_attention import NativeAttention, NativePlan
from megatron_medha.kernels.native_build import usable_targets

DTYPES = [torch.float32, torch.bfloat16]


class KeyRange(NamedTuple):
    """Consecutive rows of the packed batch, and the earlier keys of their sequence that the pool holds."""

    first_row: int
    num_rows: int
    num_keys: int     # that the first row sees
    is_causal: bool   # each further row sees one key more; otherwise all see the same
    runs: np.ndarray  # int64 [R, 2]: first key, first slot


def plan_keys(ranges: Sequence[KeyRange], slots: np.ndarray | None) -> NativePlan:
    """Rows that see any number of the pool's keys. slots: of the batch's own; None: unwritten."""
    rows = np.array(
        [
            (r.first_row, r.num_rows, r.num_keys, r.is_causal, r.runs.ctypes.data, len(r.runs), 0, 1024, 0, 0, 0)
            for r in ranges
        ],
        dtype=np.int64,
    )
    runs, none = tuple(r.runs for r in ranges), (None,) * len(ranges)
    return NativePlan(slots, rows, runs, none, 0, torch.get_num_threads(), slots is not None)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    """Heads and head dims, those of published models and odd ones."""
    return {
        "num_kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 9)),
        "head_dim": draw(st.sampled_from([8, 17, 40, 64, 72, 80, 96, 112, 128, 192, 256])),
        "block_size": draw(st.sampled_from([1, 4, 16, 24, 32])),
    }


@settings(max_examples=20, deadline=None)
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(TARGETS), st.randoms(use_true_random=False))
def test_any_shape_any_blocks_any_chunks_are_plain_attention(
    shape: dict[str, int], dtype: torch.dtype, target: str, rng: random.Random
) -> None:
    if target.replace("AMX_PLAIN", "AVX512") not in usable_targets():
        return
    world = World(NativeAttention(target), dtype=dtype, num_blocks=1 + 3000 // shape["block_size"], **shape)
    num_tokens = rng.randint(1, 250)
    needed = -(-num_tokens // shape["block_size"])
    lengths: list[int] = []
    while sum(lengths) < needed:
        lengths.append(rng.randint(1, 1 + needed // 3))
    sequences = [world.add(num_tokens, lengths[::-1] if index else lengths) for index in range(2)]
    while sequences:
        work = [(s, min(rng.choice([1, 1, 5, 40, 130]), num_tokens - s.num_computed)) for s in sequences]
        world.step(work)
        sequences = [s for s in sequences if s.num_computed < num_tokens]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_context_is_cut_by_keys_and_merged(native: NativeAttention, dtype: torch.dtype) -> None:
    world = World(native, num_kv_heads=1, group=2, head_dim=16, dtype=dtype, num_blocks=5000)
    long, short = world.add(70_000), world.add(30)
    # Written without being attended to: rows that see no key.
    no_keys = KeyRange(0, 69_990, 0, False, long.table.runs_in_order())
    kv = long.k_SKD[:69_990], long.v_SKD[:69_990]
    plan = plan_keys([no_keys], long.table.slots(0, 69_990))
    native.attend(plan, torch.zeros(69_990, 1, 2, 16, dtype=dtype), *kv, world.layer, world.scale)
    long.num_computed = 69_990
    world.step([(short, 28)])
    world.step([(long, 1), (short, 1)])
    world.step([(long, 9), (short, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_the_same_to_the_bit_however_the_work_is_cut(native: NativeAttention, dtype: torch.dtype) -> None:
    num_tokens, threads = 2500, torch.get_num_threads()
    outputs = []
    try:
        for num_threads, extents, chunks in (
            (1, None, [2500]),
            (2, [40, 1, 60, 60], [2499, 1]),
            (2, None, [3] * 5 + [2400, 1] + [84]),
            (5, [1] * 157, [700] * 3 + [399] + [1]),
        ):
            torch.set_num_threads(num_threads)
            torch.manual_seed(0)
            world = World(native, num_kv_heads=2, group=3, head_dim=32, dtype=dtype)
            sequence = world.add(num_tokens, extents)
            q_TKGD = torch.randn(num_tokens, 2, 3, 32).to(dtype)
            outputs.append(advanced(world, sequence, q_TKGD, chunks))
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other)


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (48, 16), (24, 8)])
def test_matrix_tiles_and_their_plain_version_give_the_same_bits(head_dim: int, block_size: int) -> None:
    outputs = []
    for target in ("AMX", "AMX_PLAIN"):
        native = native_of(target)
        torch.manual_seed(0)
        random.seed(0)
        world = World(native, num_kv_heads=2, group=3, head_dim=head_dim, dtype=torch.bfloat16, block_size=block_size)
        sequence = world.add(300, [5, 2, 1, 1, 40])
        q_TKGD = torch.randn(300, 2, 3, head_dim).bfloat16()
        outputs.append(advanced(world, sequence, q_TKGD, [130, 1, 7, 161, 1]))
    assert torch.equal(*outputs)


def advanced(world: World, sequence, q_TKGD: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """The outputs of a whole prompt, computed in these chunks with these queries."""
    outs, start = [], 0
    for count in chunks:
        rows = slice(start, start + count)
        plan = world.backend.plan([QueryRange(0, count, start, sequence.table)])
        outs.append(
            world.backend.attend(
                plan, q_TKGD[rows], sequence.k_SKD[rows], sequence.v_SKD[rows], world.layer, world.scale
            )
        )
        start += count
    assert start == len(q_TKGD)
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 7, 60])
def test_log_sum_exps_and_rows_that_see_any_number_of_keys(
    native: NativeAttention, num_rows: int, dtype: torch.dtype
) -> None:
    world = World(native, num_kv_heads=2, group=3, head_dim=48, dtype=dtype)
    sequence = world.add(700, [10, 40])
    world.step([(sequence, 700)])
    q_TKGD, *kv = (torch.randn(3 * num_rows, 2, *rest).to(dtype) for rest in ((3, 48), (48,), (48,)))
    runs = sequence.table.runs_in_order()
    ranges = [
        KeyRange(0, num_rows, 500, False, runs),  # a shard before the sequence's last
        KeyRange(num_rows, num_rows, 600, True, runs),
        KeyRange(2 * num_rows, num_rows, 0, False, np.empty((0, 2), dtype=np.int64)),  # no key at all
    ]
    out_THD, lse_TH = native.attend_with_lse(plan_keys(ranges, None), q_TKGD, *kv, world.layer, world.scale)
    for first_row, _, num_keys, is_causal, _ in ranges:
        rows = slice(first_row, first_row + num_rows)
        seen = slice(0, num_keys + (num_rows - 1) * is_causal)
        expected_THD, expected_lse_TH = reference.attention(
            q_TKGD[rows].flatten(1, 2), sequence.k_SKD[seen], sequence.v_SKD[seen], world.scale, is_causal=is_causal
        )
        assert (out_THD[rows].double() - expected_THD).abs().max() < TOLERANCE[dtype]
        if num_keys:
            assert (lse_TH[rows].double() - expected_lse_TH).abs().max() < 1e-5
        else:
            assert not out_THD[rows].any() and lse_TH[rows].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_take_their_part_of_the_softmax_whatever_rows_stand_beside(
    native: NativeAttention, dtype: torch.dtype
) -> None:
    world = World(native, num_kv_heads=2, group=3, head_dim=48, dtype=dtype)
    sequence = world.add(90)
    sinks_H = torch.tensor([-torch.inf, -3.0, 0.0, 1.0, 5.0, 60.0])
    q_TKGD = torch.randn(90, 2, 3, 48).to(dtype)
    numbers = (q_TKGD, sequence.k_SKD, sequence.v_SKD)
    plan = native.plan([QueryRange(0, 90, 0, sequence.table)])
    out_THD = native.attend(plan, *numbers, world.layer, world.scale, sinks_H)
    without_THD, lse_TH = native.attend_with_lse(plan, *numbers, world.layer, world.scale)
    expected_THD, _ = with_sinks(without_THD, lse_TH, sinks_H)
    assert (out_THD.double() - expected_THD.double()).abs().max() < TOLERANCE[dtype]
    assert torch.equal(out_THD[:, 0], without_THD[:, 0]) and not out_THD[:, 5].float().abs().max() > 1e-6
    for first, count in [(0, 7), (7, 1), (8, 82)]:
        plan = native.plan([QueryRange(0, count, first, sequence.table)])
        rows = slice(first, first + count)
        alone_THD = native.attend(plan, *(x[rows] for x in numbers), world.layer, world.scale, sinks_H)
        assert torch.equal(alone_THD, out_THD[rows])
    with pytest.raises(ValueError, match="sinks"):
        native.attend(plan, *(x[rows] for x in numbers), world.layer, world.scale, sinks_H[:4])


def test_rows_of_another_ranks_shard_are_not_written_and_see_every_earlier_key(native: NativeAttention) -> None:
    world = World(native, num_kv_heads=2, group=2, head_dim=16, dtype=torch.float32)
    ours, theirs = world.add(50), world.add(60)
    world.step([(ours, 40), (theirs, 30)])
    before = theirs.table.slots(30, 5)
    ranges = [QueryRange(0, 4, 40, ours.table), QueryRange(4, 5, 30, theirs.table, is_written=False)]
    q_TKGD, k_TKD, v_TKD = torch.randn(9, 2, 2, 16), *torch.randn(2, 9, 2, 16)
    out_THD, lse_TH = native.attend_with_lse(native.plan(ranges), q_TKGD, k_TKD, v_TKD, world.layer, world.scale)
    keys_NDL = world.layer.k[0].view(-1, 16, 16)  # of one head, by group, dimension and lane
    assert keys_NDL[before // 16, :, before % 16].isnan().all(), "a slot of the other rank was written"
    expected_THD, expected_lse_TH = reference.attention(
        q_TKGD[4:].flatten(1, 2), theirs.k_SKD[:30], theirs.v_SKD[:30], world.scale, is_causal=False
    )
    assert (out_THD[4:].double() - expected_THD).abs().max() < 1e-5
    assert (lse_TH[4:].double() - expected_lse_TH).abs().max() < 1e-5
    expected_THD, _ = reference.attention(
        q_TKGD[:4].flatten(1, 2),
        torch.cat((ours.k_SKD[:40], k_TKD[:4])),
        torch.cat((ours.v_SKD[:40], v_TKD[:4])),
        world.scale,
        is_causal=True,
    )
    assert (out_THD[:4].double() - expected_THD).abs().max() < 1e-5


def test_large_and_tiny_scores_neither_overflow_nor_turn_into_nan(native: NativeAttention) -> None:
    world = World(native, num_kv_heads=1, group=1, head_dim=16, dtype=torch.float32)
    sequence = world.add(40)
    sequence.k_SKD *= torch.tensor([1e4, 1e-30, -1e4, 0.0]).repeat(10)[:, None, None]
    world.step([(sequence, 39)])
    world.step([(sequence, 1)])


def test_powers_of_two_are_exact_to_2e_7_and_zero_for_minus_infinity(native: NativeAttention) -> None:
    x = np.concatenate([-np.logspace(-8, np.log10(126), 20_000), np.zeros(8), [-126.5, -149.0, -1e30, -np.inf] * 4])
    x32 = x[: len(x) // 16 * 16].astype(np.float32)
    y = np.empty_like(x32)
    native.library.medha_exp2(x32.ctypes.data, y.ctypes.data, len(x32))
    expected = np.where(x32 < -126, 0.0, 2.0 ** x32.astype(np.float64))
    near_edge = (x32 < -125.9) & (x32 > -127)  # results that are denormal may be 0
    assert np.all(y[x32 <= -127] == 0.0)
    assert np.all(y[x32 == 0.0] == 1.0)
    relative = np.abs(y - expected)[~near_edge & (expected > 0)] / expected[~near_edge & (expected > 0)]
    assert relative.max() < 2e-7


def test_a_key_that_is_not_a_number_shows_and_one_of_another_sequence_does_not(native: NativeAttention) -> None:
    world = World(native, num_kv_heads=1, group=1, head_dim=16, dtype=torch.float32, block_size=8)
    broken, sound = world.add(20), world.add(20)
    world.step([(broken, 9), (sound, 20)])
    broken.k_SKD[9] = torch.nan
    out_THD = advanced(world, broken, torch.randn(20, 1, 1, 16), [20])
    assert out_THD[:9].isfinite().all() and out_THD[9:].isnan().all()


def test_strided_queries_keys_and_values_are_read_where_they_lie(native: NativeAttention) -> None:
    world = World(native, num_kv_heads=2, group=2, head_dim=16, dtype=torch.float32)
    sequence = world.add(50)
    mixed = torch.randn(50, 2, 4, 16)
    q, k, v = mixed[:, :, :-2], mixed[:, :, -2], mixed[:, :, -1]
    assert not q.is_contiguous() and not k.is_contiguous()
    sequence.k_SKD, sequence.v_SKD = k, v
    out_THD = advanced(world, sequence, q, [50])
    expected_THD, _ = reference.attention(q.flatten(1, 2), k, v, world.scale, is_causal=True)
    assert (out_THD.double() - expected_THD).abs().max() < TOLERANCE[torch.float32]


def test_what_does_not_fit_the_pool_is_refused(native: NativeAttention) -> None:
    world = World(native, num_kv_heads=2, group=2, head_dim=16, dtype=torch.float32)
    sequence = world.add(8)
    plan = plan_keys([KeyRange(0, 3, 1, True, sequence.table.runs_in_order())], np.arange(3))

    def attend(heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32, tokens: int = 3) -> None:
        q, k = torch.zeros(tokens, heads, 2, head_dim, dtype=dtype), torch.zeros(tokens, heads, head_dim, dtype=dtype)
        native.attend(plan, q, k, k, world.layer, 1.0)

    attend()
    for wrong in ({"heads": 1}, {"head_dim": 32}, {"dtype": torch.bfloat16}, {"tokens": 4}):
        with pytest.raises(ValueError):
            attend(**wrong)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        native.allocate(4, 16, 2, 16, torch.float16)
