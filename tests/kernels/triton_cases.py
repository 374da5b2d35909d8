"""The Triton kernels against plain attention, interpreted. Run by test_triton_kernels.py, in a process of its own."""

from __future__ import annotations

from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

use_interpreter()

import dataclasses  # noqa: E402
import random  # noqa: E402
from array import array  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_medha.cluster.messages import NewRequest  # noqa: E402
from megatron_medha.core.kv.block_pool import Extent  # noqa: E402
from megatron_medha.core.kv.ops import KVOp, append_op, copy_op, drop_op  # noqa: E402
from megatron_medha.core.sampling import Sampling  # noqa: E402
from megatron_medha.kernels.attention import reference, work_list  # noqa: E402
from megatron_medha.kernels.attention.backend import QueryRange  # noqa: E402
from megatron_medha.kernels.kv.paged_kv import E4M3, PagedKV, allocate_paged  # noqa: E402
from megatron_medha.kernels.kv.slot_table import SlotTable  # noqa: E402
from megatron_medha.kernels.triton import triton_widen  # noqa: E402
from megatron_medha.kernels.triton.triton_attention import DeviceWork, TileConfig, paged_attention  # noqa: E402
from megatron_medha.kernels.triton.triton_backend import TritonAttention, block_pieces  # noqa: E402
from megatron_medha.kernels.triton.triton_merge import merge_tiles  # noqa: E402
from megatron_medha.kernels.triton.triton_nucleus import nucleus_cut  # noqa: E402
from megatron_medha.kernels.triton.triton_tiles import INTERPRETED_TILE  # noqa: E402
from megatron_medha.kernels.triton.triton_write import rotate_and_write  # noqa: E402
from megatron_medha.worker.table_ops import execute_kv_ops  # noqa: E402
from megatron_medha.worker.token_store import TokenStore  # noqa: E402

CPU = torch.device("cpu")
BLOCK_SIZE = 16
# fp32 sums of some hundred terms; 8 bits of bf16 or 11 of fp16 in keys, weights and outputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _cut_early(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    random.seed(0)
    monkeypatch.setattr(work_list, "_ITEM_OVERHEAD_BLOCKS", 0.5)  # so that short sequences are cut, too


class Paged:
    """Sequences in one pool of shuffled blocks, advanced through the backend and checked at every step."""

    def __init__(self, *, heads: int, group: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, tma: bool):
        tile = dataclasses.replace(INTERPRETED_TILE, has_tma=tma)
        self.backend = TritonAttention(CPU, group=group, prefill_tile=tile, decode_tile=tile)
        self.layer = self.backend.allocate(64, BLOCK_SIZE, heads, head_dim, kv_dtype)
        if kv_dtype != E4M3:  # a kernel that reads a slot that was never written will show it
            self.layer.k_NKPD.fill_(torch.nan)
            self.layer.v_NKPD.fill_(torch.nan)
        self.shape = (heads, group, head_dim)
        self.dtype, self.free = dtype, random.sample(range(64), 64)
        self.tokens: dict[SlotTable, tuple[Tensor, Tensor]] = {}
        self.scale = head_dim**-0.5

    def add(self) -> SlotTable:
        heads, _, head_dim = self.shape
        table = SlotTable(BLOCK_SIZE)
        self.tokens[table] = tuple(torch.empty(0, heads, head_dim, dtype=self.dtype) for _ in range(2))
        return table

    def step(self, work: list[tuple[SlotTable, int]], rotates: bool = False) -> float:
        """The largest error of outputs and log-sum-exps over one packed batch."""
        heads, group, head_dim = self.shape
        num_tokens = sum(count for _, count in work)
        mixed = torch.randn(num_tokens, heads, group + 2, head_dim).to(self.dtype)
        q, k, v = mixed[:, :, :-2], mixed[:, :, -2], mixed[:, :, -1]
        ranges, row = [], 0
        for table, count in work:
            start = len(self.tokens[table][0])
            while table.num_slots < start + count:
                table.append([(self.free.pop(), 1)])
            ranges.append(QueryRange(row, count, start, table))
            row += count
        plan = self.backend.plan(ranges)
        if rotates:
            angle = torch.rand(num_tokens, head_dim // 2) * 6
            cos, sin = torch.cos(angle), torch.sin(angle)
            out = self.backend.attend_rotating(
                plan, q, k, v, (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), self.layer, self.scale
            )
            q, k, lse = rotated(q, cos[:, None, None], sin[:, None, None]), rotated(k, cos[:, None], sin[:, None]), None
        else:
            out, lse = self.backend.attend_with_lse(plan, q, k, v, self.layer, self.scale)
        error = 0.0
        for r in ranges:
            rows = slice(r.first_row, r.first_row + r.num_rows)
            seen = tuple(torch.cat((old, new[rows])) for old, new in zip(self.tokens[r.table], (k, v)))
            self.tokens[r.table] = seen
            expected, expected_lse = reference.attention(q[rows].flatten(1, 2), *seen, self.scale, is_causal=True)
            error = max(error, (out[rows].double() - expected).abs().max().item())
            if lse is not None:
                error = max(error, (lse[rows].double() - expected_lse).abs().max().item())
        return error


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


@pytest.mark.parametrize(
    ("heads", "group", "dtype", "tma"),
    [
        (1, 1, torch.float32, False),
        (2, 3, torch.float32, True),
        (1, 8, torch.bfloat16, True),
        (2, 2, torch.float16, False),
    ],
)
def test_chunks_and_decodes_of_unequal_lengths_share_a_batch(
    heads: int, group: int, dtype: torch.dtype, tma: bool
) -> None:
    world = Paged(heads=heads, group=group, head_dim=32, dtype=dtype, kv_dtype=dtype, tma=tma)
    long, short, fresh = world.add(), world.add(), world.add()
    assert world.step([(long, 66), (short, 9)]) < TOLERANCE[dtype]
    assert world.step([(short, 1), (long, 21), (fresh, 1)]) < TOLERANCE[dtype]
    assert world.step([(long, 1), (short, 1), (fresh, 17)], rotates=True) < TOLERANCE[dtype]


@settings(max_examples=4, deadline=None)
@given(st.lists(st.lists(st.sampled_from((0, 1, 2, 15, 16, 17, 33)), min_size=2, max_size=2), min_size=2, max_size=3))
def test_any_mixture_of_chunks_over_any_history_is_exact(steps: list[list[int]]) -> None:
    world = Paged(heads=2, group=2, head_dim=16, dtype=torch.float32, kv_dtype=torch.float32, tma=False)
    tables = [world.add() for _ in range(2)]
    for counts in steps:
        work = [(table, count) for table, count in zip(tables, counts) if count]
        if work:
            assert world.step(work) < TOLERANCE[torch.float32]


def test_rows_of_another_ranks_shard_see_all_of_this_one_and_write_nothing() -> None:
    world = Paged(heads=2, group=2, head_dim=32, dtype=torch.float32, kv_dtype=torch.float32, tma=False)
    table, empty = world.add(), world.add()
    world.step([(table, 70)])
    before = world.layer.k_NKPD.clone()
    q, k, v = torch.randn(20, 2, 2, 32), torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    plan = world.backend.plan([QueryRange(0, 12, 70, table, False), QueryRange(12, 8, 0, empty, False)])
    out, lse = world.backend.attend_with_lse(plan, q, k, v, world.layer, world.scale)
    expected, expected_lse = reference.attention(
        q[:12].flatten(1, 2), *world.tokens[table], world.scale, is_causal=False
    )
    assert (out[:12].double() - expected).abs().max() < 1e-5
    assert (lse[:12].double() - expected_lse).abs().max() < 1e-5
    assert not out[12:].any()
    assert lse[12:].isneginf().all()
    assert torch.equal(before.nan_to_num(), world.layer.k_NKPD.nan_to_num())


def test_e4m3_attention_is_exact_on_what_the_pool_holds_and_the_pool_holds_e4m3_of_what_came() -> None:
    heads, group, head_dim = 1, 2, 32
    tile = dataclasses.replace(INTERPRETED_TILE, has_tma=True)
    backend = TritonAttention(CPU, group=group, prefill_tile=tile, decode_tile=tile)
    layer = backend.allocate(16, BLOCK_SIZE, heads, head_dim, E4M3)
    table = SlotTable(BLOCK_SIZE)
    k, v = torch.randn(2, 60, heads, head_dim).bfloat16()
    k *= torch.arange(1, 61)[:, None, None]  # later tokens are larger: scales of half-filled blocks must grow
    done = 0
    for count in (21, 1, 1, 30, 7):
        while table.num_slots < done + count:
            table.append([(15 - table.num_slots // BLOCK_SIZE * 2, 1)])
        q = torch.randn(count, heads, group, head_dim).bfloat16()
        new = slice(done, done + count)
        plan = backend.plan([QueryRange(0, count, done, table)])
        out, _ = backend.attend_with_lse(plan, q, k[new], v[new], layer, 0.05)
        done += count
        blocks = torch.from_numpy(table.slots(0, done)) // BLOCK_SIZE
        places = torch.from_numpy(table.slots(0, done)) % BLOCK_SIZE
        held = [
            pool.transpose(1, 2)[blocks, places].float() * scale[blocks][..., None]
            for pool, scale in ((layer.k_NKPD, layer.k_scale_NK), (layer.v_NKPD, layer.v_scale_NK))
        ]
        expected, _ = reference.attention(q.flatten(1, 2), *held, 0.05, is_causal=True)
        assert (out.double() - expected).abs().max() < TOLERANCE[torch.bfloat16]
        for stored, given_, scale in zip(held, (k, v), (layer.k_scale_NK, layer.v_scale_NK)):
            assert (stored.abs() <= 448 * scale[blocks][..., None]).all()
            # 3 bits of mantissa: 1/16 by rounding, or, at the subnormal end, a step (half by rounding, half when
            # the block's scale has grown).
            least = scale[blocks][..., None] * 2.0**-9
            error = (stored - given_[:done].float()).abs()
            bad = error > torch.maximum(given_[:done].float().abs() / 16, least)
            assert not bad.any(), (stored[bad], given_[:done][bad], scale[blocks][..., None].expand_as(bad)[bad])
        mantissa, _ = torch.frexp(layer.k_scale_NK[blocks])
        assert (mantissa == 0.5).all()  # powers of two: growing is exact


def plain_attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale: float, window: int, cap: float, sinks_H: Tensor
) -> Tensor:
    """In fp64, aligned at the end; written apart from the reference, which has none of these."""
    num_tokens, num_heads, _ = q_THD.shape
    k, v = (x.double().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k_SKD, v_SKD))
    scores = cap * torch.tanh(torch.einsum("thd,shd->hts", q_THD.double(), k) * scale / cap)
    last = torch.arange(num_tokens)[:, None] + len(k) - num_tokens
    key = torch.arange(len(k))[None, :]
    scores = scores.masked_fill((key > last) | (key <= last - window), -torch.inf)
    with_sinks = torch.cat((scores, sinks_H.double()[:, None, None].expand(-1, num_tokens, 1)), -1)
    return torch.einsum("hts,shd->thd", with_sinks.softmax(-1)[..., :-1], v)


@pytest.mark.parametrize(
    ("head_dim", "group", "kv_dtype", "tma"),
    [
        pytest.param(80, 1, torch.float32, True, id="a head dim of two powers of two, by tensor maps"),
        pytest.param(88, 3, torch.float32, False, id="a head dim whose rest is padded"),
        pytest.param(16, 36, torch.float32, False, id="a group cut among programs"),
        pytest.param(48, 2, E4M3, False, id="e4m3"),
    ],
)
def test_windows_sinks_and_caps_are_those_of_plain_attention(
    head_dim: int, group: int, kv_dtype: torch.dtype, tma: bool
) -> None:
    window = 23
    tile = dataclasses.replace(INTERPRETED_TILE, has_tma=tma)
    backend = TritonAttention(CPU, group=group, prefill_tile=tile, decode_tile=tile)
    dtype = torch.bfloat16 if kv_dtype == E4M3 else kv_dtype
    heads, cap, scale = 1 if group > 32 else 2, 3.0, head_dim**-0.5
    backend.score_cap = cap
    layer = backend.allocate(16, BLOCK_SIZE, heads, head_dim, kv_dtype)
    sinks = torch.randn(heads * group)
    table, other = SlotTable(BLOCK_SIZE), SlotTable(BLOCK_SIZE)
    table.append([(9, 2), (3, 1), (5, 3)])
    other.append([(12, 2)])
    k, v = (torch.randn(80, heads, head_dim).to(dtype) for _ in range(2))
    done = 0
    for count in (34, 1, 6):
        q = torch.randn(count + 3, heads, group, head_dim).to(dtype)
        new_k, new_v = (torch.cat((x[done : done + count], x[:3])) for x in (k, v))
        ranges = [QueryRange(0, count, done, table), QueryRange(count, 3, 0, other)]
        windowed = [r._replace(lowest_key=r.start + 1 - window) for r in ranges]
        for found, seen in ((ranges, 1000), (windowed, window)):
            out = backend.attend(backend.plan(found), q, new_k, new_v, layer, scale, sinks)
            lone = slice(count, None)
            held = [held_values(layer, index, table, done + count) for index in range(2)]
            held_lone = [held_values(layer, index, other, 3) for index in range(2)]
            expected = plain_attention(q[:count].flatten(1, 2), *held, scale, seen, cap, sinks)
            assert (out[:count].double() - expected).abs().max() < TOLERANCE[dtype]
            expected = plain_attention(q[lone].flatten(1, 2), *held_lone, scale, seen, cap, sinks)
            assert (out[lone].double() - expected).abs().max() < TOLERANCE[dtype]
        done += count


def held_values(layer: PagedKV, index: int, table: SlotTable, count: int) -> Tensor:
    """Keys (0) or values (1) of a sequence as the pool holds them, [S, K, D]."""
    slots = torch.from_numpy(table.slots(0, count))
    blocks, places = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    held = (layer.k_NKPD, layer.v_NKPD)[index].transpose(1, 2)[blocks, places]
    scales = (layer.k_scale_NK, layer.v_scale_NK)[index]
    return held if scales is None else held.float() * scales[blocks][..., None]


@pytest.mark.parametrize("kv_dtype", [torch.float32, E4M3])
def test_latent_vectors_that_are_keys_and_values_are_written_and_read_once(kv_dtype: torch.dtype) -> None:
    group, head_dim = 40, 48
    backend = TritonAttention(CPU, group=group)
    layer = backend.allocate(8, BLOCK_SIZE, 1, head_dim, kv_dtype, are_values_keys=True)
    assert len(list(layer)) == (2 if kv_dtype == E4M3 else 1)
    dtype = torch.bfloat16 if kv_dtype == E4M3 else kv_dtype
    table = SlotTable(BLOCK_SIZE)
    table.append([(6, 1), (1, 4)])
    latent = torch.randn(60, 1, head_dim).to(dtype)
    for start, count in ((0, 19), (19, 1)):
        q = torch.randn(count, 1, group, head_dim).to(dtype)
        kv = latent[start : start + count]
        out, lse = backend.attend_with_lse(
            backend.plan([QueryRange(0, count, start, table)]), q, kv, kv, layer, head_dim**-0.5
        )
        held = held_values(layer, 0, table, start + count)
        expected, expected_lse = reference.attention(q.flatten(1, 2), held, held, head_dim**-0.5, is_causal=True)
        assert (out.double() - expected).abs().max() < TOLERANCE[dtype]
        assert (lse.double() - expected_lse).abs().max() < TOLERANCE[dtype]


def test_rows_whose_window_lies_past_another_ranks_shard_see_nothing_of_it() -> None:
    backend = TritonAttention(CPU, group=1)
    layer = backend.allocate(8, BLOCK_SIZE, 1, 16, torch.float32)
    table = SlotTable(BLOCK_SIZE)
    table.append([(2, 5)])
    k, v = torch.randn(2, 70, 1, 16)
    backend.attend(backend.plan([QueryRange(0, 70, 0, table)]), torch.randn(70, 1, 1, 16), k, v, layer, 0.25)
    q = torch.randn(30, 1, 1, 16)
    plan = backend.plan([QueryRange(0, 30, 70, table, False, lowest_key=50)])  # of rows from 20 on, none is seen
    out, lse = backend.attend_with_lse(plan, q, k[:30], v[:30], layer, 0.25)
    for row in range(20):
        expected, expected_lse = reference.attention(q[row], k[50 + row :], v[50 + row :], 0.25, is_causal=False)
        assert (out[row].double() - expected).abs().max() < 1e-5
        assert (lse[row].double() - expected_lse).abs().max() < 1e-5
    assert not out[20:].any()
    assert lse[20:].isneginf().all()
    plan = backend.plan([QueryRange(0, 3, 70, table, False, lowest_key=90)])
    assert backend.attend_with_lse(plan, q[:3], k[:3], v[:3], layer, 0.25)[1].isneginf().all()


@pytest.mark.parametrize("kv_dtype", [torch.float32, E4M3])
def test_tables_that_are_appended_to_dropped_and_begun_over_copied_blocks_are_read_as_they_are(
    kv_dtype: torch.dtype,
) -> None:
    """A walk of KV operations: forks share whole blocks and copy the last one, rows of dropped tables come again."""
    dtype = torch.bfloat16 if kv_dtype == E4M3 else kv_dtype
    backend = TritonAttention(CPU, group=1)
    layer = backend.allocate(24, BLOCK_SIZE, 1, 16, kv_dtype)
    free = list(range(24))
    random.shuffle(free)
    store = TokenStore(100)
    tokens: dict[str, tuple[Tensor, Tensor]] = {}
    references: dict[int, int] = {}

    def execute(*ops: KVOp) -> None:
        execute_kv_ops(
            ops, store, backend=backend, kv_layers=[layer], block_size=BLOCK_SIZE, num_blocks=24, kvp_rank=0,
            device=CPU,
        )

    def taken(count: int) -> list[Extent]:
        found = [free.pop() for _ in range(count)]
        references.update(dict.fromkeys(found, 1))
        return [Extent(block, 1) for block in found]

    def blocks_of(name: str) -> list[int]:
        table = store[name].slot_table
        return [] if table is None else (table.slots(0, table.num_slots)[::BLOCK_SIZE] // BLOCK_SIZE).tolist()

    def step(name: str, count: int) -> None:
        k, v = torch.randn(2, count, 1, 16).to(dtype)
        table, start = store[name].slot_table, len(tokens[name][0])
        q = torch.randn(count, 1, 1, 16).to(dtype)
        out = backend.attend(backend.plan([QueryRange(0, count, start, table)]), q, k, v, layer, 0.25)
        tokens[name] = tuple(torch.cat((old, new)) for old, new in zip(tokens[name], (k, v)))
        held = tokens[name]
        if kv_dtype == E4M3:
            held = tuple(held_values(layer, index, table, start + count) for index in range(2))
        expected, _ = reference.attention(q.flatten(1, 2), *held, 0.25, is_causal=True)
        assert (out.double() - expected).abs().max() < TOLERANCE[dtype]

    for number in range(6):
        name = f"r{number}"
        store.add([NewRequest(name, array("i", [1]).tobytes(), 1, Sampling(max_output_tokens=9))])
        parent = random.choice(list(tokens)) if tokens and number % 2 else None
        if parent is None:
            tokens[name] = tuple(torch.empty(0, 1, 16, dtype=dtype) for _ in range(2))
            execute(append_op(name, 0, taken(2)))
            step(name, 19)
        else:
            shared = len(tokens[parent][0]) // BLOCK_SIZE
            kept, last = blocks_of(parent)[:shared], blocks_of(parent)[shared : shared + 1]
            for block in kept:
                references[block] += 1
            own = taken(2)
            begun = append_op(name, 0, [*(Extent(block, 1) for block in kept), *own])
            copied = [copy_op(name, 0, [Extent(block, 1) for block in last], own[: len(last)])] if last else []
            execute(*copied, begun)
            tokens[name] = tokens[parent]
        step(name, 1)
        step(name, 5)
        if number in (2, 4):
            gone = random.choice(list(tokens))
            for block in blocks_of(gone):
                references[block] -= 1
                if not references[block]:
                    free.insert(0, block)
            execute(drop_op(gone))
            del tokens[gone]
        for other in list(tokens):
            if len(blocks_of(other)) * BLOCK_SIZE < len(tokens[other][0]) + 2:
                execute(append_op(other, 0, taken(1)))
            step(other, 1)


def test_with_fixed_splits_a_row_has_the_same_bits_alone_in_any_batch_and_in_any_chunks() -> None:
    """And without them it has not, as a lone sequence is cut finer than one of many."""
    k, v, q = torch.randn(110, 1, 16), torch.randn(110, 1, 16), torch.randn(110, 1, 2, 16)

    def bits(fixed: int | None, chunks: tuple[int, ...], beside: int) -> Tensor:
        backend = TritonAttention(CPU, group=2)
        backend.fixed_split_tokens = fixed
        layer = backend.allocate(40, BLOCK_SIZE, 1, 16, torch.float32)
        tables = [SlotTable(BLOCK_SIZE) for _ in range(2)]
        tables[0].append([(31, 8)])
        tables[1].append([(0, 30)])
        outs, start = [], 0
        for count in chunks:
            rows = slice(start, start + count)
            ranges = [QueryRange(0, count, start, tables[0])]
            extra = [torch.randn(beside, *x.shape[1:]) for x in (q, k, v)]
            if beside:
                ranges.append(QueryRange(count, beside, 300, tables[1]))
            batch = [torch.cat((x[rows], more)) for x, more in zip((q, k, v), extra)]
            outs.append(backend.attend(backend.plan(ranges), *batch, layer, 0.25)[:count])
            start += count
        return torch.cat(outs)

    expected = bits(48, (109, 1), 0)
    assert torch.equal(bits(48, (109, 1), 60), expected)
    assert torch.equal(bits(48, (40, 30, 39, 1), 3), expected)
    plain, _ = reference.attention(q.flatten(1, 2), k, v, 0.25, is_causal=True)
    assert (expected.double() - plain).abs().max() < 1e-5
    assert not torch.equal(bits(None, (109, 1), 60), bits(None, (109, 1), 0))


@pytest.mark.parametrize("kv_dtype", [torch.float32, E4M3])
def test_chunks_read_blocks_that_follow_one_another_without_looking_them_up(kv_dtype: torch.dtype) -> None:
    backend = TritonAttention(CPU, group=2)
    layer = backend.allocate(64, BLOCK_SIZE, 2, 16, kv_dtype)
    whole, broken = SlotTable(BLOCK_SIZE), SlotTable(BLOCK_SIZE)
    whole.append([(40, 12)])
    broken.append([(30, 3), (5, 4), (2, 1), (20, 4)])
    tokens = {table: torch.randn(2, 180, 2, 16) for table in (whole, broken)}
    if kv_dtype == E4M3:
        tokens = {table: new.bfloat16() for table, new in tokens.items()}
    for work in ([(whole, 0, 131), (broken, 0, 100)], [(whole, 131, 40), (broken, 100, 35)]):
        ranges, row = [], 0
        for table, start, count in work:
            ranges.append(QueryRange(row, count, start, table))
            row += count
        q = torch.randn(row, 2, 2, 16).to(tokens[whole].dtype)
        k, v = (torch.cat([tokens[table][i, start : start + count] for table, start, count in work]) for i in range(2))
        host = backend.host_plan(ranges)
        plan = backend.on_device(host, [torch.from_numpy(array) for array in host.arrays])
        out = backend.attend(plan, q, k, v, layer, 0.25)
    run = host.chunks.items_NI[:, work_list.RUN_COLUMN]
    assert (run == 40).any() and (run == work_list.NO_RUN).any()
    table_blocks = {30, 5 - 3, 2 - 7, 20 - 8}  # of the broken one: where each run would begin, had it all the blocks
    assert {int(base) for base in run} <= {40, work_list.NO_RUN} | table_blocks
    for r in ranges:
        rows, done = slice(r.first_row, r.first_row + r.num_rows), r.start + r.num_rows
        slots = torch.from_numpy(r.table.slots(0, done))
        block, place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        held = [pool.transpose(1, 2)[block, place].float() for pool in (layer.k_NKPD, layer.v_NKPD)]
        if kv_dtype == E4M3:
            scales = [scale[block][..., None] for scale in (layer.k_scale_NK, layer.v_scale_NK)]
            held = [values * scale for values, scale in zip(held, scales)]
        expected, _ = reference.attention(q[rows].flatten(1, 2), *held, 0.25, is_causal=True)
        assert (out[rows].double() - expected).abs().max() < TOLERANCE[tokens[whole].dtype]


@pytest.mark.parametrize("segment_tokens", [16, 32, 256])
def test_what_is_before_a_long_chunk_over_e4m3_kv_is_widened_by_segments(
    segment_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_widen, "MIN_ROWS", 10)
    monkeypatch.setattr(triton_widen, "MAX_ROWS", 40)
    monkeypatch.setattr(triton_widen, "MIN_CONTEXT", 20)
    monkeypatch.setattr(triton_widen, "SEGMENT_TOKENS", segment_tokens)
    widened: list[int] = []
    attend = triton_widen.WidePool.attend

    def noted(self: triton_widen.WidePool, segments: list[triton_widen.WideSegment], *rest: Any, **named: Any) -> None:
        widened.append(len(segments))
        attend(self, segments, *rest, **named)

    monkeypatch.setattr(triton_widen.WidePool, "attend", noted)
    heads, group, head_dim = 2, 2, 16
    backend = TritonAttention(CPU, group=group)
    layer = backend.allocate(32, BLOCK_SIZE, heads, head_dim, E4M3)
    long, other = SlotTable(BLOCK_SIZE), SlotTable(BLOCK_SIZE)
    long.append([(31 - 2 * i, 1) for i in range(6)])
    other.append([(2, 5)])
    tokens = {table: torch.randn(2, 96, heads, head_dim).bfloat16() for table in (long, other)}
    tokens[long][1] *= torch.arange(1, 97)[:, None, None] / 8  # blocks of unequal scales
    for work in ([(long, 0, 45), (other, 0, 30)], [(other, 30, 1), (long, 45, 37), (other, 31, 33)]):
        ranges, row = [], 0
        for table, start, count in work:
            ranges.append(QueryRange(row, count, start, table))
            row += count
        q = torch.randn(row, heads, group, head_dim).bfloat16()
        k, v = (torch.cat([tokens[table][i, start : start + count] for table, start, count in work]) for i in range(2))
        out, lse = backend.attend_with_lse(backend.plan(ranges), q, k, v, layer, 0.2)
    for r in ranges:
        done = r.start + r.num_rows
        blocks = torch.from_numpy(r.table.slots(0, done)) // BLOCK_SIZE
        places = torch.from_numpy(r.table.slots(0, done)) % BLOCK_SIZE
        held = [
            pool.transpose(1, 2)[blocks, places].float() * scale[blocks][..., None]
            for pool, scale in ((layer.k_NKPD, layer.k_scale_NK), (layer.v_NKPD, layer.v_scale_NK))
        ]
        rows = slice(r.first_row, r.first_row + r.num_rows)
        expected, expected_lse = reference.attention(q[rows].flatten(1, 2), *held, 0.2, is_causal=True)
        spread = held[1].abs().max().item()  # values of up to 12 times the others' size
        assert (out[rows].double() - expected).abs().max() < TOLERANCE[torch.bfloat16] * max(spread / 4, 1)
        assert (lse[rows].double() - expected_lse).abs().max() < TOLERANCE[torch.bfloat16]
    # Two chunks are long enough, each in as many segments as what is before it takes.
    assert widened == [{16: 3 + 2, 32: 2 + 1, 256: 2}[segment_tokens]]


def test_pieces_of_blocks_cover_a_chunk_once() -> None:
    table = SlotTable(16)
    table.append([(5, 1), (9, 2), (2, 1)])
    pieces = block_pieces(QueryRange(100, 40, 10, table), 16)
    assert pieces.tolist() == [[5, 10, 6, 100], [9, 0, 16, 106], [10, 0, 16, 122], [2, 0, 2, 138]]


def test_what_the_kernels_cannot_take_is_refused_before_launch() -> None:
    tile = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    kv = allocate_paged(4, 16, 2, 32, torch.float32, CPU)
    q, tables = torch.zeros(3, 2, 2, 32), torch.zeros(1, 4, dtype=torch.int32)
    items = torch.zeros(1, work_list.ITEM_COLUMNS, dtype=torch.int32)
    work = DeviceWork(items, torch.zeros(0, 4, dtype=torch.int32), 0)

    def launch(**changes: object) -> None:
        arguments = {"q_TKGD": q, "kv": kv, "block_tables_SB": tables, "work": work, "out_TKGD": q.clone()}
        paged_attention(**{**arguments, **changes}, config=tile, scale=1.0, lse_TKG=None)

    with pytest.raises(ValueError, match="pool holds torch.float32, not torch.bfloat16"):
        launch(q_TKGD=q.bfloat16(), out_TKGD=q.bfloat16())
    with pytest.raises(ValueError, match="queries are torch.float64"):
        launch(q_TKGD=q.double())
    with pytest.raises(ValueError, match="do not fit a pool"):
        launch(q_TKGD=torch.zeros(3, 1, 2, 32), out_TKGD=torch.zeros(3, 1, 2, 32))
    with pytest.raises(ValueError, match="not contiguous"):
        launch(q_TKGD=torch.zeros(2, 3, 2, 32).transpose(0, 1))
    with pytest.raises(ValueError, match="do not fit into tiles"):
        launch(q_TKGD=torch.zeros(3, 2, 17, 32), out_TKGD=torch.zeros(3, 2, 17, 32))
    with pytest.raises(ValueError, match="block_size=12"):
        allocate_paged(4, 12, 2, 32, torch.float32, CPU)
    with pytest.raises(ValueError, match="head_dim=84"):
        allocate_paged(4, 16, 2, 84, torch.float32, CPU)
    with pytest.raises(ValueError, match="written by slots"):
        rotate_and_write(q, q[:, :, 0], q[:, :, 0], None, None, kv)
    with pytest.raises(ValueError, match="disagree"):
        rotate_and_write(q, q[:2, :, 0], q[:, :, 0], None, None, kv, slots_T=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit"):
        merge_tiles((torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16)), work.merges_MI, q, None)


def test_rows_of_the_device_tables_are_used_again_once_a_sequence_is_gone() -> None:
    backend = TritonAttention(CPU, group=1)
    backend.allocate(8, 16, 1, 16, torch.float32)
    assert backend.tables is not None
    first = SlotTable(16)
    first.append([(3, 2)])
    row = backend.tables.row_of(first)
    backend.plan([QueryRange(0, 1, 0, first)])
    assert backend.tables.tables_SB[row, :2].tolist() == [3, 4]
    first.append([(7, 1)])
    backend.plan([QueryRange(0, 1, 33, first)])
    assert backend.tables.tables_SB[row, :3].tolist() == [3, 4, 7]
    del first
    second = SlotTable(16)
    second.append([(6, 1)])
    backend.plan([QueryRange(0, 1, 0, second)])
    assert backend.tables.row_of(second) == row
    assert backend.tables.tables_SB[row, 0] == 6
    generation = backend.tables.generation
    others = [SlotTable(16) for _ in range(200)]
    assert len({backend.tables.row_of(table) for table in (second, *others)}) == 201
    assert backend.tables.generation > generation
    assert backend.tables.tables_SB[row, 0] == 6


@pytest.mark.parametrize("spread", [0.0, 0.1, 5.0])
def test_a_nucleus_ends_where_a_sort_finds_its_end(spread: float) -> None:
    logits = torch.randn(3, 5000) * spread
    logits[1] = logits[1].bfloat16().float()  # many ties
    logits[2, 100:] = -torch.inf
    logits -= logits.amax(dim=-1, keepdim=True)
    masses = logits.double().exp().sum(dim=-1, keepdim=True) * torch.tensor([[0.9], [0.3], [1.0 - 1e-9]])
    ordered = logits.sort(dim=-1, descending=True).values
    weights = ordered.double().exp()
    num_kept = (weights.cumsum(dim=-1) - weights < masses).sum(dim=-1, keepdim=True)
    cuts = nucleus_cut(logits, masses)
    kept, expected = (logits >= cuts).sum(dim=-1), (logits >= ordered.gather(1, num_kept - 1)).sum(dim=-1)
    assert ((logits == cuts) | cuts.isneginf()).any(dim=-1).all(), "not one of the row's logits"
    # The last row's mass is reached nowhere but by rounding.
    assert torch.equal(kept[:2], expected[:2]), (kept, expected)
    assert kept[2] >= 100
