"""The CPU attention backend `aten`: a sequence's keys gathered from the pool, then torch's own flash kernel.

For machines that cannot have `native`, which needs x86-64 and a C++ compiler: ARM servers, Macs, slim containers.
Decodes over 4K tokens take two to four times as long as with `native`.

Shapes: T query tokens, S slots, K key/value heads, G query heads per key/value head, H = K * G, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV, QueryRange, check_shapes
from megatron_medha.kernels.points import Points, pass_by

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_MAX_CAPPED_SCORES = 1 << 24  # at once, in fp32
_ROWS_BETWEEN_POINTS = 128    # each such part of the rows reads all keys again


class SequenceRead(NamedTuple):
    """One sequence's rows of the batch, and the slots of all keys that its last row sees."""

    rows: slice
    slots: Tensor | slice  # a slice, read in place, where they are consecutive
    num_keys: int
    is_causal: bool  # aligned at the end: the last row sees all slots

    def parts(self, num_rows: int) -> Iterator[SequenceRead]:
        """The same by so many rows at a time."""
        for first in range(self.rows.start, self.rows.stop, num_rows):
            end = min(first + num_rows, self.rows.stop)
            num_keys = self.num_keys - self.is_causal * (self.rows.stop - end)
            if isinstance(self.slots, slice):
                slots: Tensor | slice = slice(self.slots.start, self.slots.start + num_keys)
            else:
                slots = self.slots[:num_keys]
            yield SequenceRead(slice(first, end), slots, num_keys, self.is_causal)


class AtenPlan(NamedTuple):
    """A packed batch: where its own KV goes, and what each sequence reads."""

    rows_W: Tensor   # int64, those that are written
    slots_W: Tensor  # int64
    reads: tuple[SequenceRead, ...]


class AtenAttention(AttentionBackend):
    """Attention backend `aten`."""

    name = "aten"
    reads_by_slots = True
    caps_scores = True
    _points: Points | None = None

    @contextmanager
    def looking(self, points: Points) -> Iterator[None]:
        """See AttentionBackend."""
        self._points = points
        try:
            yield
        finally:
            self._points = None

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerKV:
        """Uninitialised KV of one layer: two tensors [K, num_blocks * block_size, D]."""
        shape = (num_kv_heads, num_blocks * block_size, head_dim)
        return LayerKV(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))

    def copy_blocks(self, layer: Iterable[Tensor], sources_B: Tensor, targets_B: Tensor, block_size: int) -> None:
        """See AttentionBackend."""
        for values_KSD in layer:
            values_KNW = values_KSD.view(len(values_KSD), -1, block_size * values_KSD.shape[2])
            values_KNW[:, targets_B] = values_KNW[:, sources_B]

    def plan(self, ranges: Sequence[QueryRange]) -> AtenPlan:
        """Slots to write and slots to read, for all layers of one step."""
        reads, rows, slots = [], [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for first_row, num_rows, start, table, is_written, *_ in ranges:
            end_row, num_keys = first_row + num_rows, start + num_rows * is_written
            if is_written:
                rows.append(torch.arange(first_row, end_row))
                slots.append(torch.from_numpy(table.slots(start, num_rows)))
            if table.num_runs == 1:
                first_slot = table.slot(0)
                keys: Tensor | slice = slice(first_slot, first_slot + num_keys)
            else:
                keys = torch.from_numpy(table.slots(0, num_keys))
            reads.append(SequenceRead(slice(first_row, end_row), keys, num_keys, is_written and num_rows > 1))
        return AtenPlan(torch.cat(rows), torch.cat(slots), tuple(reads))

    def attend(
        self, plan: AtenPlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD."""
        assert len(plan.rows_W) == len(q_TKGD), "rows of another rank's shard need attend_with_lse"
        return self.attend_with_lse(plan, q_TKGD, k_TKD, v_TKD, layer, scale)[0]

    def attend_with_lse(
        self, plan: AtenPlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence; (out_THD, lse_TH fp32)."""
        num_tokens, num_kv_heads, _, head_dim = q_TKGD.shape
        check_shapes(q_TKGD, k_TKD, v_TKD)
        layer.k.index_copy_(1, plan.slots_W, k_TKD[plan.rows_W].transpose(0, 1))
        layer.v.index_copy_(1, plan.slots_W, v_TKD[plan.rows_W].transpose(0, 1))
        parts = [_attend(q_TKGD[read.rows], layer, read, scale, self.score_cap) for read in self._reads(plan)]
        return torch.cat([out_THD for out_THD, _ in parts]), torch.cat([lse_TH for _, lse_TH in parts])


    def _reads(self, plan: AtenPlan) -> Iterator[SequenceRead]:
        points, self._points = self._points, None  # none in what is computed at one
        if points is None:
            yield from plan.reads
            return
        for read in plan.reads:
            for part in read.parts(_ROWS_BETWEEN_POINTS):
                pass_by(points)
                yield part
        self._points = points


def _attend(
    q_TKGD: Tensor, layer: LayerKV, read: SequenceRead, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """One sequence's (out_THD, lse_TH); 0 and -inf where it has no key."""
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    if not read.num_keys:  # the kernel dies (SIGFPE) on an empty range of keys
        q_THD = q_TKGD.flatten(1, 2)
        return torch.zeros_like(q_THD), q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32)
    if cap is not None:
        return _attend_capped(q_TKGD, layer, read, scale, cap)
    k_1KSD, v_1KSD = (x[:, read.slots].unsqueeze(0) for x in layer)
    if not read.is_causal:
        # Queries of a group as rows of one head: 2.8 (fp32) to 8 (bf16) times faster than the kernel's own groups.
        q_1KFD = q_TKGD.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * num_tokens, head_dim)
        out, lse = _flash(q_1KFD, k_1KSD, v_1KSD, scale=scale)
        out_KGTD, lse_KGT = out.reshape(num_kv_heads, group, num_tokens, head_dim), lse.reshape(num_kv_heads, group, -1)
        return out_KGTD.permute(2, 0, 1, 3).flatten(1, 2), lse_KGT.permute(2, 0, 1).flatten(1, 2)
    # The kernel's own causal mask is aligned at the start.
    mask_TS = q_TKGD.new_full((num_tokens, read.num_keys), -torch.inf).triu_(read.num_keys - num_tokens + 1)
    q_1HTD = q_TKGD.flatten(1, 2).transpose(0, 1).unsqueeze(0)
    out_1HTD, lse_1HT = _flash(q_1HTD, k_1KSD, v_1KSD, attn_mask=mask_TS[None, None], scale=scale)
    return out_1HTD[0].transpose(0, 1), lse_1HT[0].transpose(0, 1)


def _attend_capped(
    q_TKGD: Tensor, layer: LayerKV, read: SequenceRead, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """The same with capped scores, which torch's kernel does not have. In fp32, some rows at a time."""
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    k_KSD, v_KSD = (x[:, read.slots].float() for x in layer)
    last_T = torch.arange(read.num_keys - num_tokens, read.num_keys)
    keys_S = torch.arange(read.num_keys)
    outs, lses = [], []
    each = max(1, _MAX_CAPPED_SCORES // (num_kv_heads * group * read.num_keys))
    for q_RKGD, last_R in zip(q_TKGD.split(each), last_T.split(each), strict=True):
        q_KFD = q_RKGD.float().permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
        scores_KFS = torch.tanh_(q_KFD @ k_KSD.transpose(1, 2) * (scale / cap)) * cap
        scores_KGRS = scores_KFS.unflatten(1, (group, -1))
        if read.is_causal:
            scores_KGRS.masked_fill_(keys_S > last_R[:, None], -torch.inf)
        lse_KGR = scores_KGRS.logsumexp(-1)
        out_KFD = torch.exp(scores_KGRS - lse_KGR[..., None]).flatten(1, 2) @ v_KSD
        outs.append(out_KFD.unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2).to(q_TKGD.dtype))
        lses.append(lse_KGR.permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)
