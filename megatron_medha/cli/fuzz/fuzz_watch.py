"""How other clients fare during `medha selftest`: /health every 50 ms, and what /metrics shows every second."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from megatron_medha.cli.fuzz.fuzz_wire import RawClient, ServerMisbehaved

_POLL_S = 0.05
_METRICS_EVERY = 20  # polls
_MAX_FAILURES = 3


@dataclass(slots=True)
class ServerObservations:
    """What was seen since the last look. Waiting is measured by the server: this process is busy with its cases."""

    num_polls: int = 0
    worst_lag_s: float | None = None      # of the server's event loop; None: it does not show it
    memory_bytes: float | None = None     # resident, now
    most_memory_bytes: float = 0.0        # of that, once a second
    peak_memory_bytes: float | None = None
    failures: list[str] = field(default_factory=list)


class ServerMonitor:
    """Polls a server until its task is cancelled."""

    def __init__(self, wire: RawClient) -> None:
        self._wire = wire
        self._seen = ServerObservations()

    async def look(self) -> ServerObservations:
        """What was seen since the last call, until now."""
        await self._read_metrics()
        seen, self._seen = self._seen, ServerObservations()
        return seen

    async def run(self) -> None:
        """Poll."""
        num_polls = 0
        while True:
            try:
                answer = await self._wire.ask("GET", "/health")
                failure = None if answer is not None and answer.status == 200 else f"status {answer and answer.status}"
            except (OSError, ServerMisbehaved) as error:
                failure = str(error) or type(error).__name__
            self._seen.num_polls += 1
            if failure is not None and len(self._seen.failures) < _MAX_FAILURES:
                self._seen.failures.append(failure)
            num_polls += 1
            if num_polls % _METRICS_EVERY == 0:
                await self._read_metrics()
            await asyncio.sleep(_POLL_S)

    async def _read_metrics(self) -> None:
        try:
            values = await self._wire.metrics()
        except (OSError, ServerMisbehaved):
            return
        seen, lag_s = self._seen, values.get(b"event_loop_lag_max_seconds")
        if lag_s is not None:
            seen.worst_lag_s = max(seen.worst_lag_s or 0.0, lag_s)
        seen.memory_bytes = values.get(b"process_resident_memory_bytes")
        seen.most_memory_bytes = max(seen.most_memory_bytes, seen.memory_bytes or 0.0)
        seen.peak_memory_bytes = values.get(b"process_peak_memory_bytes")
