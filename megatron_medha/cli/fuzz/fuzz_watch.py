"""What others have of a server meanwhile: a process of its own asks /health every 50 ms, and /metrics every second.

A process, because the one that sends the cases is busy itself, and would measure its own waiting.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import ssl
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

POLL_S = 0.05
_METRICS_EVERY = 20  # polls
_TIMEOUT_S = 60.0
_MAX_FAILURES = 3
_SAMPLE = re.compile(rb"^(?:medha:)?(\w+)(?:\{[^}]*\})? ([\d.e+-]+)$", re.MULTILINE)


@dataclass(slots=True)
class ServerObservations:
    """What was seen since the last time somebody looked."""

    num_polls: int = 0
    worst_health_s: float = 0.0
    worst_lag_s: float | None = None      # of the server's event loop, by its own work; None: it does not show it
    memory_bytes: float | None = None     # resident, now
    most_memory_bytes: float = 0.0        # of that, once a second
    peak_memory_bytes: float | None = None
    failures: list[str] = field(default_factory=list)


class ServerMonitor:
    """The process, and what it has seen."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, url: str, api_key: str | None) -> ServerMonitor:
        """Begin to look."""
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, stdin=PIPE, stdout=PIPE)
        assert process.stdin is not None
        process.stdin.write(json.dumps([url, api_key]).encode() + b"\n")
        return cls(process)

    async def look(self) -> ServerObservations:
        """What was seen since the last call, until now."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        line = await self._process.stdout.readline()
        return ServerObservations(**json.loads(line))

    async def end(self) -> None:
        """No more."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


class _Poller:
    """Asks, until its standard input ends."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._parts = urlsplit(url)
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._seen = ServerObservations()
        self._lock = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._poll, daemon=True).start()
        for _ in sys.stdin:
            self._read_metrics()
            with self._lock:
                seen, self._seen = self._seen, ServerObservations()
            print(json.dumps(asdict(seen)), flush=True)

    def _poll(self) -> None:
        num_polls = 0
        while True:
            begun_s = time.perf_counter()
            try:
                status, failure = self._get("/health")[0], ""
            except (OSError, http.client.HTTPException) as error:
                status, failure = 0, repr(error)
            waited_s = time.perf_counter() - begun_s
            with self._lock:
                self._seen.num_polls += 1
                self._seen.worst_health_s = max(self._seen.worst_health_s, waited_s)
                if status != 200 and len(self._seen.failures) < _MAX_FAILURES:
                    self._seen.failures.append(failure or f"status {status}")
            num_polls += 1
            if num_polls % _METRICS_EVERY == 0:
                self._read_metrics()
            time.sleep(max(0.0, POLL_S - (time.perf_counter() - begun_s)))

    def _read_metrics(self) -> None:
        try:
            values = {name: float(value) for name, value in _SAMPLE.findall(self._get("/metrics")[1])}
        except (OSError, http.client.HTTPException, ValueError):
            return
        with self._lock:
            seen, lag_s = self._seen, values.get(b"event_loop_lag_max_seconds")
            if lag_s is not None:
                seen.worst_lag_s = max(seen.worst_lag_s or 0.0, lag_s)
            seen.memory_bytes = values.get(b"process_resident_memory_bytes")
            seen.most_memory_bytes = max(seen.most_memory_bytes, seen.memory_bytes or 0.0)
            seen.peak_memory_bytes = values.get(b"process_peak_memory_bytes")

    def _get(self, path: str) -> tuple[int, bytes]:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl._create_unverified_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=_TIMEOUT_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


if __name__ == "__main__":
    _Poller(*json.loads(sys.stdin.readline())).run()
