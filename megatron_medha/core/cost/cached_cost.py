"""The cluster cost model with a memory: a simulation asks for the same few steps a million times."""

from __future__ import annotations

from functools import lru_cache

from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

_NUM_STEPS = 1 << 17   # (tokens, sequences) remembered: all that an hour of the paper's mix asks for
_NUM_LAYERS = 1 << 14  # token counts of one layer


class CachedClusterCost(ClusterCost):
    """The same figures, to the bit; each is worked out once, and asked for without a detour through a method."""

    def __init__(
        self, *, shape: ModelShape, hardware: Hardware, engine: EngineCosts, layout: ParallelLayout
    ) -> None:
        super().__init__(shape=shape, hardware=hardware, engine=engine, layout=layout)
        self.linear_s = lru_cache(_NUM_STEPS)(super().linear_s)  # type: ignore[method-assign]
        self.layer_s = lru_cache(_NUM_LAYERS)(super().layer_s)  # type: ignore[method-assign]
        self.attention_s = self._attention.chunk_s  # type: ignore[method-assign]
        self.decode_attention_s = self._attention.decode_s  # type: ignore[method-assign]
