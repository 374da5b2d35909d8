"""Limits on prefills as other systems have them: how many may have begun, and a share of the step for short ones."""

from __future__ import annotations

from math import inf

from megatron_medha.core.kv.kv_memory import ChunkShard, KVMemory
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.batch_builder import BatchBuilder
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.sim.baselines.baseline_config import BaselineConfig


class PartialPrefillLimits:
    """PrefillLimits after vLLM's max_num_partial_prefills and max_long_partial_prefills, and of a reserved share.

    Under a token budget, each of a limited number of prompts gets an even part of it (vLLM's first scheduler).
    """

    def __init__(self, config: BaselineConfig) -> None:
        self._config = config
        self._num_left: float = inf       # that may begin in the batch being formed
        self._num_long_left: float = inf  # of those, long ones
        self._chunk_tokens: int | None = None

    def begin(self, memory: KVMemory, num_candidates: int) -> None:
        """See PrefillLimits."""
        config = self._config
        begun = [seq for seq in memory.owners.values() if seq.is_prefill and seq.num_unscheduled_tokens]
        if config.max_partial_prefills is not None:
            self._num_left = config.max_partial_prefills - len(begun)
            if config.chunking is Chunking.FIXED:
                num_parts = max(1, min(config.max_partial_prefills, num_candidates))
                self._chunk_tokens = config.fixed_chunk_tokens // num_parts
        if config.max_long_partial_prefills is not None:
            self._num_long_left = config.max_long_partial_prefills - sum(map(self._is_long, begun))

    def admit(self, seq: Sequence) -> bool:
        """See PrefillLimits."""
        return bool(seq.block_table.shards) or self._num_left > 0 and not (
            self._is_long(seq) and self._num_long_left <= 0
        )

    def max_prefill_tokens(self, builder: BatchBuilder, seq: Sequence, parts: tuple[ChunkShard, ...]) -> int | None:
        """See PrefillLimits. A prompt that is not short may fill the step only up to what is reserved."""
        config = self._config
        if not config.reserved_share or seq.request.num_prompt_tokens <= config.short_prompt_tokens:
            return self._chunk_tokens
        open_share = 1.0 - config.reserved_share
        if config.chunking is Chunking.FIXED:
            return max(int(open_share * config.fixed_chunk_tokens) - builder.num_tokens, 0)
        return builder.fit(seq, parts, open_share)

    def begun(self, seq: Sequence) -> None:
        """See PrefillLimits."""
        self._num_left -= 1
        self._num_long_left -= self._is_long(seq)

    def _is_long(self, seq: Sequence) -> bool:
        return seq.num_unscheduled_tokens > self._config.short_prompt_tokens
