"""When a rank counts as lost, and how often that may happen. Pure: times come in as arguments."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_medha.core.errors import check_range

LOAD_HEARTBEAT_TIMEOUT_S = 60.0  # of a rank that starts: importing libraries may hold a process up
MAX_CHECK_INTERVAL_S = 1.0  # four times the interval at which the runtime looks (cluster/runtime.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """How faults of ranks are found, and how many are lived through."""

    heartbeat_timeout_s: float = 4.0          # silence of a rank that serves; ranks say something every second
    step_timeout_factor: float = 20.0         # times its predicted duration that a step may take, ...
    min_step_timeout_s: float = 60.0          # ... but at least this: predictions can be wrong before any step is seen
    max_failures: int = 3                     # this many within failure_window_s end the server; 1: the first one does
    failure_window_s: float = 60.0            # of serving: time spent on loading does not count
    max_starts: int = 1                       # tries to bring the ranks up again after a failure

    def __post_init__(self) -> None:
        for key, low, high in (
            ("heartbeat_timeout_s", 1.5, 3600.0),
            ("step_timeout_factor", 1.0, 1e6),
            ("min_step_timeout_s", 0.1, 86400.0),
            ("max_failures", 1, 1 << 30),
            ("failure_window_s", 0.0, 1e9),
            ("max_starts", 1, 1 << 30),
        ):
            check_range(f"recovery.{key}", getattr(self, key), low, high)


class Heartbeats:
    """When each rank was last heard of.

    Silence counts while somebody listens: an API server that was itself put aside for seconds, by a busy machine or by
    SIGSTOP, finds the clock ahead of messages that have long come. So from one look to the next at most
    MAX_CHECK_INTERVAL_S count.
    """

    def __init__(self, ranks: Iterable[int], timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._last_heard_s = dict.fromkeys(ranks, now_s)
        self._checked_s = now_s

    def heard(self, rank: int, now_s: float) -> None:
        """A message of that rank came."""
        self._last_heard_s[rank] = now_s

    def restart(self, timeout_s: float, now_s: float) -> None:
        """From now on silence is measured by another limit."""
        self._timeout_s = timeout_s
        self._checked_s = now_s
        for rank in self._last_heard_s:
            self._last_heard_s[rank] = now_s

    def failure(self, now_s: float) -> str | None:
        """The rank that has been silent for too long, in words; None while all are well. Ask often."""
        unheeded_s = now_s - self._checked_s - MAX_CHECK_INTERVAL_S
        self._checked_s = now_s
        if unheeded_s > 0.0:
            for rank, heard_s in self._last_heard_s.items():
                self._last_heard_s[rank] = min(now_s, heard_s + unheeded_s)
        rank = min(self._last_heard_s, key=self._last_heard_s.__getitem__)
        silent_s = now_s - self._last_heard_s[rank]
        return f"rank {rank} has been silent for {silent_s:.1f} s" if silent_s > self._timeout_s else None


class StepWatchdog:
    """Finds steps that hang: while batches are in flight, something must come back within the limit of the oldest."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._limits_s: dict[int, float] = {}  # by batch, oldest first
        self._progress_s = 0.0                 # since when the oldest one may be running

    def submitted(self, batch_id: int, predicted_s: float, now_s: float) -> None:
        """A batch went out."""
        if not self._limits_s:
            self._progress_s = now_s
        self._limits_s[batch_id] = max(
            self._config.min_step_timeout_s, self._config.step_timeout_factor * predicted_s
        )

    def completed(self, batch_id: int, now_s: float) -> None:
        """A batch came back."""
        del self._limits_s[batch_id]
        self._progress_s = now_s

    def clear(self) -> None:
        """Nothing is in flight any more."""
        self._limits_s.clear()

    def failure(self, now_s: float) -> str | None:
        """The step that hangs, in words; None while all is well."""
        if not self._limits_s:
            return None
        batch_id, limit_s = next(iter(self._limits_s.items()))
        elapsed_s = now_s - self._progress_s
        if elapsed_s <= limit_s:
            return None
        return f"batch {batch_id} has taken {elapsed_s:.1f} s, more than {limit_s:.1f} s"


class FailureCount:
    """Whether to go on after a failure: not when failures come too often."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._times_s: deque[float] = deque()

    def failed(self, served_s: float) -> bool:
        """Count a failure after so many seconds of serving in all; whether the ranks may be started again.

        By time served, or a request that brings the ranks down whenever it is computed would do so for ever where
        loading the model takes long.
        """
        self._times_s.append(served_s)
        while served_s - self._times_s[0] > self._config.failure_window_s:
            self._times_s.popleft()
        return len(self._times_s) < self._config.max_failures

    def __len__(self) -> int:
        return len(self._times_s)
