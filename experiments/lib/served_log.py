"""A server's decision log, read whole: its steps and when they ran, and when its requests came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medha.core.batch import Arrived, Batch, Completed
from megatron_medha.core.request import Request
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.stats.decision_log import Recorded, read_log


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A batch that has run."""

    batch: Batch
    submitted_s: float
    completed_s: float
    reported_s: float  # by the rank: without messages and the scheduler's own time

    @property
    def whole_s(self) -> float:
        """From its submission until the scheduler heard of its end."""
        return self.completed_s - self.submitted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLog:
    """What happened on one server."""

    header: dict[str, Any]
    records: tuple[Recorded, ...]
    lengths: dict[str, int]                     # of prompts, by request id
    arrivals: dict[int, tuple[float, Request]]  # by prompt length: when the scheduler heard of it
    first_tokens_s: dict[int, float]            # by prompt length: when the scheduler heard of the step's end
    steps: tuple[Step, ...]

    @property
    def setup(self) -> SchedulerSetup:
        """Of the scheduler, as it was at the start."""
        return SchedulerSetup.from_header(self.header)

    @classmethod
    def read(cls, path: Path) -> ServedLog:
        """A log to its end."""
        with path.open(encoding="utf-8") as lines:
            header, found = read_log(lines)
            records = tuple(found)
        arrivals: dict[int, tuple[float, Request]] = {}
        lengths: dict[str, int] = {}
        first_tokens_s: dict[int, float] = {}
        in_flight: dict[int, tuple[Batch, float]] = {}
        steps: list[Step] = []
        for record in records:
            entry = record.entry
            if isinstance(entry, Arrived):
                request = entry.request
                arrivals[request.num_prompt_tokens] = record.now_s, request
                lengths[request.request_id] = request.num_prompt_tokens
            elif isinstance(entry, Batch):
                in_flight[entry.batch_id] = entry, record.now_s
            elif isinstance(entry, Completed):
                batch, submitted_s = in_flight.pop(entry.batch_id)
                steps.append(
                    Step(batch=batch, submitted_s=submitted_s, completed_s=record.now_s, reported_s=entry.duration_s)
                )
                for chunk in batch.chunks:
                    if chunk.samples_token:
                        first_tokens_s.setdefault(lengths[chunk.request_id], record.now_s)
        return cls(
            header=header,
            records=records,
            lengths=lengths,
            arrivals=arrivals,
            first_tokens_s=first_tokens_s,
            steps=tuple(steps),
        )
