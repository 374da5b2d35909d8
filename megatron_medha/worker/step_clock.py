"""How long a device works on a step."""

from __future__ import annotations

import time

import torch


class StepClock:
    """Runs from when a step's input is on the device until all it has asked of the device is done.

    A GPU is handed its work long before it does it. A rank that answered then would have the front believe that a stage
    is free which is not, and that chunks take no time.
    """

    def __init__(self, device: torch.device) -> None:
        self._started_s = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        """What was asked of the device so far, a receive too, is not counted."""
        self._started_s = time.monotonic()
        if self._events is not None:
            self._events[0].record()

    def stop(self) -> float:
        """Waits for the device. Seconds since `start`."""
        if self._events is None:
            return time.monotonic() - self._started_s
        started, stopped = self._events
        stopped.record()
        stopped.synchronize()
        return started.elapsed_time(stopped) / 1e3
