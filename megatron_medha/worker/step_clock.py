"""How long a device works on a step."""

from __future__ import annotations

import time

import torch


class StepTimer:
    """Measures from when a step's input is on the device until all it has asked of the device is done.

    A GPU is handed its work long before it does it. A rank that answered then would have the scheduler predict that
    a stage is free which is not, and that chunks take no time. What was asked of the device before, a receive too, is
    not counted. Several steps may be in flight on the device, each after the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self._started_s = self._stopped_s = time.monotonic()
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> None:
        """All of the step has been asked for."""
        self._stopped_s = time.monotonic()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """From its creation to `stop`; waits for the device."""
        if self._events is None:
            return self._stopped_s - self._started_s
        started, stopped = self._events
        stopped.synchronize()
        return started.elapsed_time(stopped) / 1e3
