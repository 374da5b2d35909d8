"""Sequences over paged KV that advance through a backend, every output compared with plain attention."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.kv.slot_table import SlotTable

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

    def __init__(
        self,
        backend: AttentionBackend,
        *,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        num_blocks: int = 400,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.backend = backend
        self.layer = self.backend.allocate(num_blocks, block_size, num_kv_heads, head_dim, dtype)
        for tensor in self.layer:
            tensor.fill_(torch.nan)  # a kernel that reads a slot that was never written will show it
        self.num_kv_heads, self.group, self.head_dim, self.dtype = num_kv_heads, group, head_dim, dtype
        self.block_size, self.num_blocks = block_size, num_blocks
        self.free_blocks = set(range(num_blocks))
        self.scale = head_dim**-0.5

    def add(self, num_tokens: int, extent_lengths: list[int] | None = None) -> PagedSequence:
        """A sequence whose blocks lie in extents of the given lengths, far from one another."""
        table = SlotTable(self.block_size)
        needed = -(-num_tokens // self.block_size)
        lengths = extent_lengths or [needed]
        assert sum(lengths) >= needed
        for length in lengths:
            first = random.randrange(self.num_blocks)
            while not self.free_blocks.issuperset(range(first, first + length)):
                first = random.randrange(self.num_blocks)
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
