"""Attention of rows whose KV lies on several kvp ranks: over this rank's shard, exchanged with the others', merged.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.attention.merge import merge_outputs, with_sinks
from megatron_medha.kernels.attention.native_shards import NativeShards, PendingShard
from megatron_medha.parallel.kv_exchange import KVExchange
from megatron_medha.parallel.node_exchange import NodeExchange

# A peer that is about as far as we are answers within this; beyond it Python waits, and can be ended.
_NATIVE_WAIT_NS = 2_000_000


class SharedAttention(Protocol):
    """Of the shared rows of one batch; every layer attends once. All ranks that share rows do so in the same order."""

    attended_s: float | None  # when this rank's part of the last layer was done, by time.perf_counter, if it is known

    def attend(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
        agree: Callable[[], None] | None = None,
    ) -> Tensor:
        """Write this rank's own keys and values to the pool, and attend over all ranks' shards; returns out_THD.

        sinks_H: see with_sinks. agree: called before anything is sent; the library asks its points itself.
        """
        return self.begin(q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H, agree)()

    def begin(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
        agree: Callable[[], None] | None = None,
    ) -> Callable[[], Tensor]:
        """`attend`, without waiting for other ranks; what is returned is called for out_THD before the next layer's."""
        ...


class MergedOutputs(SharedAttention):
    """Every rank normalises its part. Merged outputs differ in their last bits from those of one rank."""

    attended_s = None

    def __init__(self, backend: AttentionBackend, plan: Any, exchange: KVExchange) -> None:
        """plan: the backend's own, for these rows alone, over this rank's shards."""
        self._backend, self._plan, self._exchange = backend, plan, exchange

    def begin(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
        agree: Callable[[], None] | None = None,
    ) -> Callable[[], Tensor]:
        """See SharedAttention."""
        own = self._backend.attend_with_lse(self._plan, q_TKGD, k_TKD, v_TKD, layer, scale)
        if sinks_H is not None:
            own = with_sinks(*own, self._parts_of_sinks(sinks_H))
        if agree is not None:
            agree()
        on_their_way = self._exchange.begin(*own)

        def merged() -> Tensor:
            outs = [merge_outputs(parts) for parts in on_their_way()]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        return merged

    def _parts_of_sinks(self, sinks_H: Tensor) -> Tensor:
        """[T, H]: less by log(R) where R ranks share a row, so that together they add the score once."""
        sinks_H = sinks_H.float()
        parts = [
            (sinks_H - math.log(len(found.kvp_ranks))).expand(found.num_rows, -1) for found in self._exchange.sets
        ]
        return torch.cat(parts)


class MergedNodes(SharedAttention):
    """Ranks exchange results of nodes of one merge tree, and all of them have the output of a rank with all keys.

    On one machine a layer is a call of the library; larger messages, and those between machines, take the exchange.
    """

    def __init__(self, native: NativeShards, exchange: NodeExchange) -> None:
        """native: of these rows alone, over this rank's shards."""
        self._native, self._exchange = native, exchange

    @property
    def attended_s(self) -> float | None:  # type: ignore[override]
        """See SharedAttention."""
        return self._native.attended_s or None

    def attend(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
        agree: Callable[[], None] | None = None,
    ) -> Tensor:
        """See SharedAttention."""
        begun = self._native.begin(q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H)
        if not self._fits_slots(begun):
            return self._begun(begun, agree)()
        if self._native.attend_and_send(begun, _NATIVE_WAIT_NS):
            return begun.out_THD
        return self._merged(begun)

    def begin(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
        agree: Callable[[], None] | None = None,
    ) -> Callable[[], Tensor]:
        """See SharedAttention."""
        begun = self._native.begin(q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H)
        return self._begun(begun, agree)

    def _begun(self, begun: PendingShard, agree: Callable[[], None] | None) -> Callable[[], Tensor]:
        if self._fits_slots(begun):
            self._native.attend_and_send(begun)
            return partial(self._merged, begun)
        self._native.attend(begun)
        if agree is not None:
            agree()
        on_their_way = self._exchange.begin(begun.nodes_NHE)

        def merged() -> Tensor:
            self._native.merge_arrived(begun, on_their_way())
            return begun.out_THD

        return merged

    def _fits_slots(self, begun: PendingShard) -> bool:
        """Whether the library can exchange it; larger messages are few, and bound by attention itself."""
        _, num_heads, width = begun.nodes_NHE.shape
        return self._exchange.fits_slots(4 * num_heads * width)

    def _merged(self, begun: PendingShard) -> Tensor:
        while not self._native.merge(begun, _NATIVE_WAIT_NS):
            self._exchange.wait_for_slots()
        return begun.out_THD
