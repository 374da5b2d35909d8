"""What a rank does with a step's KV operations: block tables of its requests, and copies of blocks in its pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.worker.token_store import TokenStore


def execute_kv_ops(
    kv_ops: Sequence[KVOp],
    requests: TokenStore,
    *,
    backend: AttentionBackend,
    kv_layers: Sequence[LayerKV],
    block_size: int,
    device: torch.device,
) -> set[str]:
    """Execute them in order; the requests whose tables were dropped."""
    dropped: set[str] = set()
    for op in kv_ops:
        assert op.group == 0, f"{op}: there is one group of layers"
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


def _blocks(extents: Sequence[Extent], device: torch.device) -> torch.Tensor:
    numbers = [np.arange(first, first + count, dtype=np.int64) for first, count in extents]
    return torch.from_numpy(np.concatenate(numbers)).to(device)
