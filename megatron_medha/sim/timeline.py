"""A window of a run as Chrome/Perfetto trace events: which chunks ran when on which stage of which KVP rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TextIO

from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.engine.outcome import Outcome
from megatron_medha.sim.pipeline import Span

_REQUESTS_PID = 1_000_000  # above any KVP rank


class Timeline:
    """An Observer, and a taker of spans and outcomes, that writes trace events as they come.

    https://ui.perfetto.dev and chrome://tracing read the file: one process per KVP rank, one track per stage, and
    every request that ended with its waiting, prefill and decode. Times in the file are microseconds.
    """

    def __init__(self, stream: TextIO, spp: int, kvp: int, start_s: float, end_s: float) -> None:
        self._stream = stream
        self._start_s = start_s
        self._end_s = end_s
        self._descriptions: dict[int, tuple[str, dict[str, Any]]] = {}  # of the batch at hand, by KVP rank
        self._batch: Batch | None = None
        self._separator = "\n"
        stream.write('{"displayTimeUnit":"ms","traceEvents":[')
        for rank in range(kvp):
            self._meta("process_name", rank, 0, f"KVP rank {rank}")
            for stage in range(spp):
                self._meta("thread_name", rank, stage, f"stage {stage}")
        self._meta("process_name", _REQUESTS_PID, 0, "requests")

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer. The spans of this batch come next."""
        self._batch = batch
        self._descriptions.clear()

    def span(self, span: Span) -> None:
        """A batch ran on a stage."""
        if span.end_s < self._start_s or span.start_s > self._end_s:
            return
        batch = self._batch
        assert batch is not None and batch.batch_id == span.batch_id
        if span.kvp_rank not in self._descriptions:
            self._descriptions[span.kvp_rank] = _description(batch, span.kvp_rank)
        name, arguments = self._descriptions[span.kvp_rank]
        self._write(
            {
                "name": name,
                "ph": "X",
                "pid": span.kvp_rank,
                "tid": span.stage,
                "ts": _us(span.start_s),
                "dur": _us(span.end_s - span.start_s),
                "args": arguments,
            }
        )

    def ended(self, outcome: Outcome) -> None:
        """A request ended: its phases, as far as they lie in the window."""
        request = outcome.request
        moments = (
            ("waiting", request.arrival_s, outcome.first_scheduled_s),
            ("prefill", outcome.first_scheduled_s, outcome.first_token_s),
            ("decode", outcome.first_token_s, outcome.last_token_s),
        )
        for name, start_s, end_s in moments:
            if start_s is None or end_s is None or end_s < self._start_s or start_s > self._end_s:
                continue
            common = {
                "name": f"{request.request_id} {name}", "cat": "request", "id": request.request_id,
                "pid": _REQUESTS_PID, "tid": 0,
            }  # fmt: skip
            facts = {"prompt_tokens": request.num_prompt_tokens, "output_tokens": request.max_output_tokens}
            self._write({**common, "ph": "b", "ts": _us(start_s), "args": facts})
            self._write({**common, "ph": "e", "ts": _us(end_s)})

    def close(self) -> None:
        """End the file; it is no JSON before that."""
        self._stream.write("\n]}\n")

    def _meta(self, what: str, pid: int, tid: int, name: str) -> None:
        self._write({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})

    def _write(self, event: dict[str, Any]) -> None:
        self._stream.write(self._separator + json.dumps(event, separators=(",", ":")))
        self._separator = ",\n"


def _description(batch: Batch, kvp_rank: int) -> tuple[str, dict[str, Any]]:
    """Name and details of what one KVP rank does in a batch."""
    chunks = batch.chunks_on(kvp_rank)
    prefills = [chunk for chunk in chunks if chunk.num_tokens > 1 or not chunk.start]
    num_decodes = len(chunks) - len(prefills)
    parts = [f"{chunk.request_id} +{chunk.num_tokens}" for chunk in prefills]
    return ", ".join([*parts, f"{num_decodes} decodes"] if num_decodes else parts), {
        "batch": batch.batch_id,
        "budget_ms": round(1e3 * batch.budget_s, 3),
        "predicted_ms": round(1e3 * batch.predicted_s, 3),
        "num_decodes": num_decodes,
        "chunks": [
            {"request": chunk.request_id, "start": chunk.start, "tokens": chunk.num_tokens} for chunk in prefills
        ],
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
