"""A model over a pool of KV blocks, step by step, as a rank runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.kernels.attention.backend import QueryRange
from megatron_medha.kernels.choose_backend import attention_backend
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.rotary import Rotary
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.worker.windows import windowed_ranges


@dataclass
class Prompt:
    """A sequence in the paged run."""

    token_ids: Tensor
    table: SlotTable
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)  # of every row so far


class PagedRun:
    """Our model over a pool of blocks; every row's logits are kept."""

    def __init__(
        self, model: GPTModel, config: ModelConfig, *, block_size: int, num_slots: int = 5120, backend: str = "auto"
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.backend = attention_backend(backend, torch.device("cpu"), score_cap=config.score_cap)
        self.rotary = Rotary(config)
        self.window = config.window
        self.kv_layers = [
            self.backend.allocate(
                num_slots // block_size, block_size, config.num_cached_heads(1), config.cached_head_dim,
                model.config.params_dtype,
            )  # fmt: skip
            for _ in range(config.num_layers)
        ]
        self.next_block = 0

    def add(self, token_ids: Tensor, *, num_extents: int = 1) -> Prompt:
        """A prompt with blocks for it, in extents that do not touch."""
        prompt = Prompt(token_ids, SlotTable(self.block_size))
        blocks_each = -(-len(token_ids) // (self.block_size * num_extents))
        for _ in range(num_extents):
            prompt.table.append([(self.next_block, blocks_each)])
            self.next_block += blocks_each + 1
        return prompt

    def step(self, work: list[tuple[Prompt, int]]) -> None:
        """Compute so many tokens of each prompt in one packed batch."""
        ranges, token_ids, positions = [], [], []
        row = 0
        for prompt, count in work:
            start = prompt.num_computed
            ranges.append(QueryRange(row, count, start, prompt.table))
            token_ids.append(prompt.token_ids[start : start + count])
            positions.append(torch.arange(start, start + count))
            row += count
        positions_T = torch.cat(positions)
        batch = PackedBatch(
            backend=self.backend,
            plan=self.backend.plan(ranges),
            window_plan=self.window_plan(ranges),
            kv_layers=self.kv_layers,
            rotation=self.rotary.at(positions_T),
            positions_T=positions_T,
            logit_rows=torch.arange(row),
        )
        with torch.inference_mode():
            logits_TV = self.model(
                torch.cat(token_ids)[None], None, None, inference_context=batch, runtime_gather_output=True
            )[0]
        row = 0
        for prompt, count in work:
            prompt.logits.append(logits_TV[row : row + count])
            prompt.num_computed += count
            row += count

    def window_plan(self, ranges: list[QueryRange]) -> Any:
        """As worker/batch_tensors.py makes it."""
        if self.window is None:
            return None
        window = self.window
        return self.backend.plan([part for each in ranges for part in windowed_ranges(each, each.start, 0, window)])
