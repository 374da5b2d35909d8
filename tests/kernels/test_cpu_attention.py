"""The CPU backend against plain attention: packed mixed batches over paged KV of every shape."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_medha.kernels import reference
from megatron_medha.kernels.backends import LayerKV, QueryRange, attention_backend
from megatron_medha.kernels.cpu_attention import CpuAttention, ReadPlan, attend_chunk, attend_prefix
from megatron_medha.kernels.merge import merge_states
from megatron_medha.kernels.slot_table import SlotTable

BLOCK_SIZE = 16
# fp32 sums of up to a thousand terms; bf16 keeps 8 bits of each output, twice (partial, then merged).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class PagedSequence:
    """One sequence with all its keys and values, of which the pool holds what has been computed."""

    k_SKD: Tensor
    v_SKD: Tensor
    table: SlotTable
    num_computed: int = 0


class World:
    """A pool of shuffled blocks and sequences that advance through the backend, checked at every step."""

    def __init__(self, *, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, num_blocks: int = 400):
        self.backend = CpuAttention()
        self.layer = self.backend.allocate(num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, dtype)
        for tensor in self.layer:
            tensor.fill_(torch.nan)  # whoever reads a slot that was never written will show it
        self.num_kv_heads, self.group, self.head_dim, self.dtype = num_kv_heads, group, head_dim, dtype
        self.free_blocks = set(range(num_blocks))
        self.scale = head_dim**-0.5

    def add(self, num_tokens: int, extent_lengths: list[int] | None = None) -> PagedSequence:
        """A sequence whose blocks lie in extents of the given lengths, far from one another."""
        table = SlotTable(BLOCK_SIZE, self.backend.min_run_tokens)
        needed = -(-num_tokens // BLOCK_SIZE)
        lengths = extent_lengths or [needed]
        assert sum(lengths) >= needed
        for length in lengths:
            starts = [b for b in self.free_blocks if self.free_blocks.issuperset(range(b, b + length))]
            first = random.choice(starts)
            self.free_blocks -= set(range(first - 1, first + length + 1))  # neighbours too: extents never touch
            table.append([(first, length)])
        shape = (num_tokens, self.num_kv_heads, self.head_dim)
        return PagedSequence(torch.randn(shape).to(self.dtype), torch.randn(shape).to(self.dtype), table)

    def step(self, work: list[tuple[PagedSequence, int]]) -> Tensor:
        """Advance each sequence by so many tokens in one packed batch; asserts the outputs, returns them."""
        ranges, queries, keys, values = [], [], [], []
        row = 0
        for sequence, count in work:
            start = sequence.num_computed
            ranges.append(QueryRange(row, count, start, sequence.table))
            queries.append(torch.randn(count, self.num_kv_heads, self.group, self.head_dim).to(self.dtype))
            keys.append(sequence.k_SKD[start : start + count])
            values.append(sequence.v_SKD[start : start + count])
            row += count
        out_THD = self.backend.attend(
            self.backend.plan(ranges), torch.cat(queries), torch.cat(keys), torch.cat(values), self.layer, self.scale
        )
        assert out_THD.dtype == self.dtype
        row = 0
        for (sequence, count), query_TKGD in zip(work, queries, strict=True):
            sequence.num_computed += count
            seen = slice(0, sequence.num_computed)
            expected_THD, _ = reference.attention(
                query_TKGD.flatten(1, 2), sequence.k_SKD[seen], sequence.v_SKD[seen], self.scale, is_causal=True
            )
            error = (out_THD[row : row + count].double() - expected_THD).abs().max().item()
            assert error < TOLERANCE[self.dtype], f"rows {row}..{row + count}: {error}"
            row += count
        return out_THD


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (1, 8), (2, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_prefill_in_chunks_then_decode_is_attention_over_the_whole(
    num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    world = World(num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype)
    sequence = world.add(160)
    for count in (33, 1, 64, 2, 50, 1, 1):
        world.step([(sequence, count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "extent_lengths",
    [
        pytest.param([60], id="one extent"),
        pytest.param([1] * 60, id="single blocks"),
        pytest.param([20, 1, 1, 30, 8], id="long and short"),
        pytest.param([1, 59], id="short then long"),
        pytest.param([17, 17, 17, 17], id="several long"),
    ],
)
def test_where_the_blocks_lie_does_not_matter(extent_lengths: list[int], dtype: torch.dtype) -> None:
    world = World(num_kv_heads=2, group=4, head_dim=32, dtype=dtype)
    sequence = world.add(60 * BLOCK_SIZE, extent_lengths)
    for count in (300, 1, 200, 15, 1, 300, 100, 1, 1, 1):
        world.step([(sequence, count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_decodes_of_many_sequences_share_a_batch(dtype: torch.dtype) -> None:
    world = World(num_kv_heads=2, group=2, head_dim=64, dtype=dtype)
    decoding = [world.add(40 + i) for i in range(3)]
    long, fragmented = world.add(600), world.add(100, [1] * 7)
    world.step([(sequence, 30 + i) for i, sequence in enumerate(decoding)] + [(long, 256), (fragmented, 17)])
    world.step([(decoding[0], 1), (long, 300), (decoding[1], 1), (fragmented, 80), (decoding[2], 1)])
    world.step([(sequence, 1) for sequence in (*decoding, long, fragmented)])
    fresh = world.add(10)
    world.step([(fresh, 10), (decoding[2], 1), (long, 1)])


def test_a_sequences_output_does_not_depend_on_who_shares_its_batch() -> None:
    outputs = []
    for num_others in (0, 3):
        torch.manual_seed(0)
        world = World(num_kv_heads=2, group=4, head_dim=64, dtype=torch.float32)
        sequence = world.add(200)
        first = world.step([(sequence, 100)])
        others = [world.add(50) for _ in range(num_others)]
        torch.manual_seed(1)
        second = world.step([(sequence, 90), *((other, 5) for other in others)])
        outputs.append((first, second[:90]))
    for alone, shared in zip(*outputs, strict=True):
        assert torch.equal(alone, shared)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_an_empty_prefix_has_lse_minus_infinity_and_does_not_kill_the_process(num_tokens: int) -> None:
    layer = LayerKV(torch.empty(2, 64, 8), torch.empty(2, 64, 8))
    out, lse = attend_prefix(torch.randn(num_tokens, 2, 3, 8), layer, ReadPlan(0, num_tokens, (), None), 1.0)
    assert out.shape == (num_tokens, 2, 3, 8)
    assert not out.any()
    assert lse.shape == (num_tokens, 2, 3)
    assert lse.isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [[], [(5, 1)], [(7, 90)], [(0, 40), (100, 60), (200, 9)]])
def test_log_sum_exps_are_those_of_the_scaled_scores(prefix: list[tuple[int, int]], dtype: torch.dtype) -> None:
    layer = LayerKV(*torch.randn(2, 2, 256, 32).to(dtype))
    q_TKGD, k_TKD, v_TKD = torch.randn(7, 2, 3, 32).to(dtype), *torch.randn(2, 7, 2, 32).to(dtype)
    out, lse = attend_chunk(q_TKGD, k_TKD, v_TKD, layer, ReadPlan(0, 7, tuple(prefix), None), 0.2)
    slots = [slot for first, count in prefix for slot in range(first, first + count)]
    expected_THD, expected_lse_TH = reference.attention(
        q_TKGD.flatten(1, 2),
        torch.cat((layer.k[:, slots].transpose(0, 1), k_TKD)),
        torch.cat((layer.v[:, slots].transpose(0, 1), v_TKD)),
        0.2,
        is_causal=True,
    )
    assert lse.dtype == torch.float32
    # The kernel's bf16 path takes its exponentials from a shorter polynomial: 2e-5 seen.
    lse_tolerance = 1e-5 if dtype == torch.float32 else 1e-4
    assert (lse.flatten(1, 2).double() - expected_lse_TH).abs().max() < lse_tolerance
    assert (out.flatten(1, 2).double() - expected_THD).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_attended_apart_and_merged_are_attention_over_the_whole(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shard_tokens, last_tokens, num_kv_heads, group, head_dim = 64, 21, 2, 3, 16
    num_keys = 2 * shard_tokens + last_tokens
    k_SKD, v_SKD = (torch.randn(num_keys, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    q_TKGD = torch.randn(num_rows, num_kv_heads, group, head_dim).to(dtype)
    scale, first_new = head_dim**-0.5, num_keys - num_rows
    parts = []
    for shard in range(3):
        is_last = shard == 2
        backend = CpuAttention()
        layer = backend.allocate(8, BLOCK_SIZE, num_kv_heads, head_dim, dtype)
        for tensor in layer:
            tensor.fill_(torch.nan)
        table = SlotTable(BLOCK_SIZE, backend.min_run_tokens)
        table.append([(4, 2), (0, 2)])
        start = shard * shard_tokens
        end = first_new if is_last else start + shard_tokens
        slots = torch.from_numpy(table.slots(0, end - start))
        layer.k[:, slots], layer.v[:, slots] = k_SKD[start:end].transpose(0, 1), v_SKD[start:end].transpose(0, 1)
        before = layer.k.clone()
        plan = backend.plan([QueryRange(0, num_rows, end - start, table, is_written=is_last)])
        parts.append(backend.attend_with_lse(plan, q_TKGD, k_SKD[first_new:], v_SKD[first_new:], layer, scale))
        assert is_last == (not torch.equal(layer.k.nan_to_num(), before.nan_to_num()))
    out_THD, lse_TH = merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    expected_THD, expected_TH = reference.attention(q_TKGD.flatten(1, 2), k_SKD, v_SKD, scale, is_causal=True)
    torch.testing.assert_close(out_THD.double(), expected_THD, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse_TH.double(), expected_TH, atol=TOLERANCE[dtype], rtol=0)


def test_a_batch_of_shards_some_written_here_and_some_elsewhere_is_each_of_them_alone() -> None:
    torch.manual_seed(1)
    backend = CpuAttention()
    layer = backend.allocate(12, BLOCK_SIZE, 2, 16, torch.float32)
    for tensor in layer:
        tensor.normal_()
    tables = []
    for first_block in (0, 4, 8):
        table = SlotTable(BLOCK_SIZE, backend.min_run_tokens)
        table.append([(first_block, 4)])
        tables.append(table)
    ranges = [
        QueryRange(0, 3, 30, tables[0]),
        QueryRange(3, 4, 64, tables[1], is_written=False),
        QueryRange(7, 1, 0, tables[2]),
    ]
    q_TKGD = torch.randn(8, 2, 3, 16)
    k_TKD, v_TKD = torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    together = backend.attend_with_lse(backend.plan(ranges), q_TKGD, k_TKD, v_TKD, layer, 0.25)
    for found in ranges:
        rows = slice(found.first_row, found.first_row + found.num_rows)
        plan = backend.plan([found._replace(first_row=0)])
        alone = backend.attend_with_lse(plan, q_TKGD[rows], k_TKD[rows], v_TKD[rows], layer, 0.25)
        for both, single in zip(together, alone, strict=True):
            torch.testing.assert_close(both[rows], single, atol=1e-6, rtol=0)
    with pytest.raises(AssertionError, match="another rank's shard"):
        backend.attend(backend.plan(ranges), q_TKGD, k_TKD, v_TKD, layer, 0.25)


def test_shapes_that_disagree_are_refused_before_the_pool_is_touched() -> None:
    backend = CpuAttention()
    layer = backend.allocate(4, BLOCK_SIZE, 2, 8, torch.float32)
    table = SlotTable(BLOCK_SIZE, backend.min_run_tokens)
    table.append([(0, 1)])
    plan = backend.plan([QueryRange(0, 3, 0, table)])
    with pytest.raises(ValueError, match="disagree"):
        backend.attend(plan, torch.zeros(3, 2, 2, 8), torch.zeros(3, 1, 8), torch.zeros(3, 1, 8), layer, 1.0)


def test_the_backend_is_chosen_by_name_and_an_unknown_one_is_refused() -> None:
    cpu = torch.device("cpu")
    assert attention_backend("auto", cpu).name == "aten"
    assert attention_backend("aten", cpu).name == "aten"
    with pytest.raises(ValueError, match="attention_backend=triton.*known: auto, aten"):
        attention_backend("triton", cpu)
