"""What a rank does with a step's KV operations: block tables of its requests, and copies of blocks in its pool.

Kernels look at no index: one outside of the pool would be a write to somebody else's memory. So each operation is
checked before it is executed. A wrong one is a bug of ours, and ends the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import KVOp, is_for
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.worker.token_store import TokenStore


def execute_kv_ops(
    kv_ops: Sequence[KVOp],
    requests: TokenStore,
    *,
    backend: AttentionBackend,
    kv_layers: Sequence[LayerKV],
    num_blocks: int,
    block_size: int,
    kvp_rank: int,
    device: torch.device,
) -> set[str]:
    """Execute them in order; the requests whose tables were dropped. num_blocks: of the pool."""
    dropped: set[str] = set()
    for op in kv_ops:
        _check(op, num_blocks, kvp_rank)
        match op.kind:
            case "append":
                request = requests[op.request_id]
                if request.slot_table is None:
                    request.slot_table = SlotTable(block_size)
                request.slot_table.append(op.extents)
            case "copy":
                sources_B, targets_B = (_blocks(extents, device) for extents in (op.sources, op.extents))
                for layer in kv_layers:
                    backend.copy_blocks(layer, sources_B, targets_B, block_size)
            case "drop":
                dropped.add(op.request_id)
                if op.request_id in requests:  # on another KVP rank it may have had blocks, and none here
                    requests[op.request_id].slot_table = None
    return dropped


def _check(op: KVOp, num_blocks: int, kvp_rank: int) -> None:
    what = f"{op.kind} for {op.request_id}"
    assert op.group == 0, f"{what}: there is one group of layers, not group {op.group}"
    assert is_for(op, kvp_rank), f"{what}: it is for kvp rank {op.kvp_rank}, not {kvp_rank}"
    for first, count in (*op.extents, *op.sources):
        is_inside = first >= 0 and 0 < count <= num_blocks - first
        assert is_inside, f"{what}: blocks [{first}, {first + count}) are not of this rank's pool of {num_blocks}"
    if op.kind == "copy":
        num_sources, num_targets = (sum([count for _, count in found]) for found in (op.sources, op.extents))
        assert num_sources == num_targets, f"{what}: {num_sources} blocks to {num_targets}"


def _blocks(extents: Sequence[Extent], device: torch.device) -> torch.Tensor:
    numbers = [np.arange(first, first + count, dtype=np.int64) for first, count in extents]
    return torch.from_numpy(np.concatenate(numbers)).to(device)
