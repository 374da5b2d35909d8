"""Batches as the dashboard and the debug routes show them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


class StepChunk(msgspec.Struct, frozen=True):
    """One prefill chunk of a step."""

    request_id: str
    start: int
    num_tokens: int
    relative_slack: float
    kvp_ranks: tuple[int, ...]


@dataclass(slots=True)
class StepRecord:
    """One batch, as it was formed and as it went."""

    batch_id: int
    at_s: float
    parts: tuple[StepChunk, ...]
    num_decodes: int
    num_tokens: int
    predicted_s: float
    budget_s: float
    num_free_blocks: int
    num_owners: int
    replica: int
    has_left_first_stage: bool = False
    duration_s: float | None = None
