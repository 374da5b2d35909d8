"""A window of a run as Chrome/Perfetto trace events: which chunks ran when on which stage of which KVP rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_medha.core.batch import Batch, Completed, Event, Output, RanksLost
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.system.best_effort_file import TextSink

_REQUESTS_PID = 1_000_000  # above any KVP rank


class StageSpan(NamedTuple):
    """A batch on one stage of one KVP rank."""

    batch_id: int
    stage: int
    kvp_rank: int
    start_s: float
    end_s: float
    held_s: float = 0.0  # of that time, in which others overtook it


class Timeline:
    """An Observer, and a taker of spans and outcomes, that writes trace events as they come.

    https://ui.perfetto.dev and chrome://tracing read the file: one process per KVP rank with one track per stage, one
    for the batches that overtake others on it, and a counter of the tokens whose KV it holds, and every request that
    ended with its waiting, prefill and decode.
    Times in the file are microseconds, in whole nanoseconds: viewers drop a slice that overlaps the one before on its
    track by as little as one. A slice whose batch is said to begin before the one before has ended begins at that end.
    """

    def __init__(
        self, stream: TextSink, *, spp: int, kvp: int, rank_name: str, start_s: float, end_s: float,
        zero_s: float = 0.0,
    ) -> None:  # fmt: skip
        """start_s, end_s: the window. zero_s: what is time 0 in the file."""
        self._stream = stream
        self._start_s, self._end_s, self._zero_s = start_s, end_s, zero_s
        self._spp = spp
        self._batches: dict[int, Batch] = {}  # that have not completed
        self._tracks: set[tuple[int, int]] = set()  # of batches that overtake, which have a name
        self._held: list[dict[str, int]] = [{} for _ in range(kvp)]  # tokens by request, on every KVP rank
        self._last_end_ns: dict[tuple[int, int], int] = {}  # by KVP rank and stage
        self._separator = "\n"
        stream.write('{"displayTimeUnit":"ms","traceEvents":[')
        for rank in range(kvp):
            self._meta("process_name", rank, 0, f"{rank_name} {rank}")
            for stage in range(spp):
                self._meta("thread_name", rank, stage, f"stage {stage}")
        self._meta("process_name", _REQUESTS_PID, 0, "requests")

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        match event:
            case Completed(batch_id=batch_id):
                self._batches.pop(batch_id, None)
            case RanksLost():
                self._batches.clear()
                self._held = [{} for _ in self._held]
            case _:
                pass

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer. The spans of this batch come next."""
        self._batches[batch.batch_id] = batch

    def span(self, span: StageSpan) -> None:
        """A batch ran on a stage; nothing is said of a rank without a part in it."""
        if span.start_s > self._end_s:
            return
        batch = self._batches[span.batch_id]
        chunks = batch.chunks_on(span.kvp_rank)
        if span.stage == 0:
            held = self._held[span.kvp_rank]
            for request_id in batch.released:
                held.pop(request_id, None)
            for chunk in chunks:
                if chunk.kvp_ranks[-1] == span.kvp_rank:
                    # What a request on one rank begins with was cached there.
                    num_before = chunk.start if len(chunk.kvp_ranks) == 1 else 0
                    held[chunk.request_id] = held.get(chunk.request_id, num_before) + chunk.num_tokens
        if not chunks or span.end_s < self._start_s:
            return
        name, arguments = _description(batch, span.kvp_rank)
        if span.held_s:
            arguments["held_ms"] = round(1e3 * span.held_s, 3)
        track = span.kvp_rank, self._track(batch, span)
        end_ns = max(self._ns(span.end_s), self._last_end_ns.get(track, 0))
        start_ns = max(self._ns(span.start_s), self._last_end_ns.get(track, 0))
        self._last_end_ns[track] = end_ns
        self._write(
            {
                "name": name,
                "ph": "X",
                "pid": span.kvp_rank,
                "tid": track[1],
                "ts": start_ns / 1000,
                "dur": (end_ns - start_ns) / 1000,
                "args": arguments,
            }
        )
        if span.stage == 0:
            held_tokens = {"tokens": sum(self._held[span.kvp_rank].values())}
            self._write(
                {"name": "KV", "ph": "C", "pid": span.kvp_rank, "ts": end_ns / 1000, "args": held_tokens}
            )

    def _track(self, batch: Batch, span: StageSpan) -> int:
        if batch.overtakes is None:
            return span.stage
        number = self._spp + span.stage
        if (span.kvp_rank, number) not in self._tracks:
            self._tracks.add((span.kvp_rank, number))
            self._meta("thread_name", span.kvp_rank, number, f"stage {span.stage}, overtaking")
        return number

    def ended(self, outcome: RequestStats) -> None:
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
            facts = {
                "prompt_tokens": request.num_prompt_tokens, "cached_tokens": outcome.num_cached_tokens,
                "output_tokens": request.max_output_tokens,
            }  # fmt: skip
            self._write({**common, "ph": "b", "ts": self._us(start_s), "args": facts})
            self._write({**common, "ph": "e", "ts": self._us(end_s)})

    def close(self) -> None:
        """End the file; it is no JSON before that."""
        self._stream.write("\n]}\n")

    def _meta(self, what: str, pid: int, tid: int, name: str) -> None:
        self._write({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})

    def _write(self, event: dict[str, Any]) -> None:
        self._stream.write(self._separator + json.dumps(event, separators=(",", ":")))
        self._separator = ",\n"

    def _ns(self, at_s: float) -> int:
        return round((at_s - self._zero_s) * 1e9)

    def _us(self, at_s: float) -> float:
        return self._ns(at_s) / 1000


def _description(batch: Batch, kvp_rank: int) -> tuple[str, dict[str, Any]]:
    """Name and details of what one KVP rank does in a batch."""
    chunks = batch.chunks_on(kvp_rank)
    prefills = [chunk for chunk in chunks if chunk.num_tokens > 1 or not chunk.start]
    num_decodes = len(chunks) - len(prefills)
    parts = [f"{chunk.request_id} +{chunk.num_tokens}" for chunk in prefills]
    overtaking = {} if batch.overtakes is None else {"overtakes": batch.overtakes}
    return ", ".join([*parts, f"{num_decodes} decodes"] if num_decodes else parts), {
        "batch": batch.batch_id,
        **overtaking,
        "budget_ms": round(1e3 * batch.budget_s, 3),
        "predicted_ms": round(1e3 * batch.predicted_s, 3),
        "num_decodes": num_decodes,
        "chunks": [
            {
                "request": chunk.request_id, "start": chunk.start, "tokens": chunk.num_tokens,
                "kvp_ranks": list(chunk.kvp_ranks),
            }
            for chunk in prefills
        ],
    }  # fmt: skip
