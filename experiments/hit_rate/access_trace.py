"""Which cached prefixes a run asked for, in which order, while which requests ran: of a run or of a decision log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from megatron_medha.core.batch import Aborted, Arrived, Batch, Completed, Event, Output
from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.core.request import Request
from megatron_medha.stats.decision_log import Recorded


class AccessKind(Enum):
    """What happens to a request's prefix."""

    BEGIN = "begin"  # it is looked up, and in use from now on
    END = "end"      # it is in use no more


class Access(NamedTuple):
    """A step of a trace."""

    kind: AccessKind
    index: int  # of the request, in order of their beginnings


@dataclass(slots=True)
class TracedRequest:
    """One request."""

    request: Request
    keys: bytearray          # of its prompt, and what its output has filled
    num_hit_tokens: int = 0  # of its prompt, as the run had it
    num_tokens_out: int = 0

    def granules(self, granule_tokens: int) -> list[bytes]:
        """Those of its prompt that can be hits: at least the last token is computed."""
        count = (self.request.num_prompt_tokens - 1) // granule_tokens
        return [bytes(self.keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]) for place in range(count)]

    @property
    def all_granules(self) -> list[bytes]:
        """Of prompt and output."""
        return [bytes(self.keys[place : place + KEY_BYTES]) for place in range(0, len(self.keys), KEY_BYTES)]


@dataclass(slots=True)
class AccessTrace:
    """An Observer that keeps what the prefix cache was asked for."""

    requests: list[TracedRequest] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    _arrived: dict[str, TracedRequest] = field(default_factory=dict)
    _running: dict[str, int] = field(default_factory=dict)
    _in_flight: dict[int, Batch] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Recorded]) -> AccessTrace:
        """Of a decision log."""
        trace = cls()
        for record in records:
            if isinstance(record.entry, Batch):
                trace.scheduled(record.entry, record.now_s)
            else:
                trace.handled(record.entry, (), record.now_s)
        return trace

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        match event:
            case Arrived(request):
                self._arrived[request.request_id] = TracedRequest(request, bytearray(request.prefix_keys))
            case Aborted(request_id):
                self._end(request_id)
            case Completed():
                for request_id, keys in event.filled_keys:
                    if (index := self._running.get(request_id)) is not None:
                        self.requests[index].keys += keys
                for chunk in self._in_flight.pop(event.batch_id).chunks:
                    index = self._running.get(chunk.request_id)
                    if chunk.samples_token and index is not None:
                        traced = self.requests[index]
                        traced.num_tokens_out += 1
                        is_last = traced.num_tokens_out == traced.request.max_output_tokens
                        if is_last or chunk.request_id in event.stopped:
                            self._end(chunk.request_id)
            case _:
                pass

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self._in_flight[batch.batch_id] = batch
        if not self._arrived:
            return
        for chunk in batch.chunks:
            if (traced := self._arrived.pop(chunk.request_id, None)) is not None:
                traced.num_hit_tokens = chunk.start
                self._running[chunk.request_id] = len(self.requests)
                self.accesses.append(Access(AccessKind.BEGIN, len(self.requests)))
                self.requests.append(traced)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests that have begun."""
        return sum(one.request.num_prompt_tokens for one in self.requests)

    @property
    def hits(self) -> list[int]:
        """Prompt tokens of each request that were hits in the run."""
        return [one.num_hit_tokens for one in self.requests]

    def _end(self, request_id: str) -> None:
        self._arrived.pop(request_id, None)
        if (index := self._running.pop(request_id, None)) is not None:
            self.accesses.append(Access(AccessKind.END, index))
