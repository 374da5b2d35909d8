"""Attention of rows whose KV lies on several kvp ranks: over this rank's shard, exchanged with the others', merged.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.attention.merge import merge_outputs, with_sinks
from megatron_medha.kernels.attention.native_shards import NativeShards, PendingShard, native_merge
from megatron_medha.parallel.kv_exchange import KVExchange

# A peer that is about as far as we are answers within this; beyond it Python waits, and can be ended.
_NATIVE_WAIT_NS = 2_000_000


class SharedAttention:
    """Of the shared rows of one batch; every layer attends once. All ranks that share rows do so in the same order.

    On one machine, with the native backend, a layer is a call of its library; otherwise parts go through the exchange.
    """

    def __init__(self, backend: AttentionBackend, plan: Any, exchange: KVExchange) -> None:
        """plan: the backend's own, for these rows alone, over this rank's shards."""
        self._backend, self._plan, self._exchange = backend, plan, exchange
        self._native: NativeShards | None = None
        self._merge_parts: Callable[[Sequence[tuple[Tensor, Tensor]]], Tensor] = merge_outputs
        if backend.is_native:
            self._merge_parts = partial(native_merge, backend)
            if exchange.links is not None:
                self._native = NativeShards(backend, plan, exchange.rank, exchange.links, exchange.sets)

    @property
    def attended_s(self) -> float | None:
        """When this rank's own part of the last layer was done, by time.perf_counter; None: not through the library."""
        return None if self._native is None else self._native.attended_s

    def attend(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write this rank's own keys and values to the pool, and attend over all ranks' shards; returns out_THD.

        sinks_H: see with_sinks.
        """
        native = None if sinks_H is not None else self._native_for(q_TKGD)
        if native is None:
            return self.begin(q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H)()
        begun, is_merged = native.attend(q_TKGD, k_TKD, v_TKD, layer, scale, _NATIVE_WAIT_NS)
        return begun.out_THD if is_merged else self._merged(native, begun)

    def begin(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """`attend`, without waiting for other ranks; what is returned is called for out_THD before the next layer's."""
        native = None if sinks_H is not None else self._native_for(q_TKGD)
        if native is not None:
            begun, _ = native.attend(q_TKGD, k_TKD, v_TKD, layer, scale)
            return partial(self._merged, native, begun)
        own = self._backend.attend_with_lse(self._plan, q_TKGD, k_TKD, v_TKD, layer, scale)
        if sinks_H is not None:
            own = with_sinks(*own, self._parts_of_sinks(sinks_H))
        on_their_way = self._exchange.begin(*own)

        def merged() -> Tensor:
            outs = [self._merge_parts(parts) for parts in on_their_way()]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        return merged

    def _parts_of_sinks(self, sinks_H: Tensor) -> Tensor:
        """[T, H]: less by log(R) where R ranks share a row, so that together they add the score once."""
        sinks_H = sinks_H.float()
        parts = [
            (sinks_H - math.log(len(found.kvp_ranks))).expand(found.num_rows, -1) for found in self._exchange.sets
        ]
        return torch.cat(parts)

    def _native_for(self, q_TKGD: Tensor) -> NativeShards | None:
        """For messages that fit in shared memory; larger ones are few, and bound by attention itself."""
        _, num_kv_heads, group, head_dim = q_TKGD.shape
        row_bytes = num_kv_heads * group * (head_dim * q_TKGD.element_size() + 4)
        return self._native if self._exchange.fits_slots(row_bytes) else None

    def _merged(self, native: NativeShards, begun: PendingShard) -> Tensor:
        while not native.merge(begun, _NATIVE_WAIT_NS):
            self._exchange.wait_for_slots()
        return begun.out_THD
