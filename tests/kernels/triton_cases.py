"""The Triton kernels against plain attention, interpreted. Run by test_triton_kernels.py, in a process of its own."""

from __future__ import annotations

from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

use_interpreter()

import dataclasses  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_medha.kernels.attention import reference, work_list  # noqa: E402
from megatron_medha.kernels.attention.backend import QueryRange  # noqa: E402
from megatron_medha.kernels.kv.paged_kv import E4M3, allocate_paged  # noqa: E402
from megatron_medha.kernels.kv.slot_table import SlotTable  # noqa: E402
from megatron_medha.kernels.triton.triton_attention import DeviceWork, TileConfig, paged_attention  # noqa: E402
from megatron_medha.kernels.triton.triton_backend import TritonAttention, block_pieces  # noqa: E402
from megatron_medha.kernels.triton.triton_merge import merge_tiles  # noqa: E402
from megatron_medha.kernels.triton.triton_nucleus import nucleus_cut  # noqa: E402
from megatron_medha.kernels.triton.triton_tiles import INTERPRETED_TILE  # noqa: E402
from megatron_medha.kernels.triton.triton_write import rotate_and_write  # noqa: E402

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


def test_pieces_of_blocks_cover_a_chunk_once() -> None:
    table = SlotTable(16)
    table.append([(5, 1), (9, 2), (2, 1)])
    pieces = block_pieces(QueryRange(100, 40, 10, table), 16)
    assert pieces.tolist() == [[5, 10, 6, 100], [9, 0, 16, 106], [10, 0, 16, 122], [2, 0, 2, 138]]


def test_what_the_kernels_cannot_take_is_refused_before_launch() -> None:
    tile = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    kv = allocate_paged(4, 16, 2, 32, torch.float32, CPU)
    q, tables = torch.zeros(3, 2, 2, 32), torch.zeros(1, 4, dtype=torch.int32)
    work = DeviceWork(torch.zeros(1, 8, dtype=torch.int32), torch.zeros(0, 4, dtype=torch.int32), 0)

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
    with pytest.raises(ValueError, match="head_dim=80"):
        allocate_paged(4, 16, 2, 80, torch.float32, CPU)
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
