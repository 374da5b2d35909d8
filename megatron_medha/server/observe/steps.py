"""Batches as the dashboard and the debug routes show them."""

from __future__ import annotations

import msgspec


class StepChunk(msgspec.Struct, frozen=True):
    """One prefill chunk of a step."""

    request_id: str
    start: int
    num_tokens: int
    relative_slack: float
    kvp_ranks: tuple[int, ...]


class StepRecord(msgspec.Struct):
    """One batch, as it was formed and as it went."""

    batch_id: int
    replica: int
    at_s: float
    chunks: tuple[StepChunk, ...]
    num_decodes: int
    num_tokens: int
    predicted_s: float
    budget_s: float
    num_free_blocks: int
    stage: int = 0           # 0, or 1: somewhere behind it
    actual_s: float | None = None
    overtakes: int | None = None  # the oldest batch that it may overtake
    held_s: float = 0.0


class InFlightBatch(StepRecord, kw_only=True):
    """A batch the ranks have."""

    chunks: tuple[StepChunk, ...] = msgspec.field(name="parts")  # a class cannot rename what it inherits
    age_s: float
