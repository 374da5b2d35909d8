"""How long a device works on a step."""

from __future__ import annotations

import time

import torch


class StepClock:
    """Measures from when a step's input is on the device until all it has asked of the device is done.

    A GPU is handed its work long before it does it. A rank that answered then would have the front believe that a stage
    is free which is not, and that chunks take no time.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def start(self) -> StepTimer:
        """What was asked of the device so far, a receive too, is not counted."""
        return StepTimer(self._is_cuda)


class StepTimer:
    """The time of one step. Several may be under way on the device, each after the one before."""

    def __init__(self, is_cuda: bool) -> None:
        self._started_s = self._stopped_s = time.monotonic()
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if is_cuda:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> None:
        """All of the step has been asked for."""
        self._stopped_s = time.monotonic()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """From `start` to `stop`; waits for the device."""
        if self._events is None:
            return self._stopped_s - self._started_s
        started, stopped = self._events
        stopped.synchronize()
        return started.elapsed_time(stopped) / 1e3
