"""Where an engine's status is written: by its world, on the engine's thread; anybody may read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_medha.core.ports import EnginePhase, EngineStatus


class StatusBoard:
    """The engine's status; it changes as a whole, so that a reader never sees half of a change."""

    def __init__(self) -> None:
        self.status = EngineStatus(EnginePhase.LOADING, "starting")
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, on_change: Callable[[], None]) -> None:
        """Have this called after every change, on the thread that makes it."""
        self._subscribers.append(on_change)

    def show(self, phase: EnginePhase, detail: str = "", fraction: float = 0.0) -> None:
        """Another phase, or other words about it; the counts stay."""
        self._change(phase=phase, detail=detail, fraction=fraction)

    def count_failure(self) -> None:
        """Ranks were lost."""
        self._change(num_failures=self.status.num_failures + 1)

    def recovered(self, detail: str) -> None:
        """The world is up again."""
        num_recoveries = self.status.num_recoveries + 1
        self._change(phase=EnginePhase.READY, detail=detail, fraction=1.0, num_recoveries=num_recoveries)

    def end(self, phase: EnginePhase, detail: str) -> None:
        """The last phase. Subscribers are not called before notify(): requests hear of it first."""
        self.status = replace(self.status, phase=phase, detail=detail, fraction=0.0)

    def notify(self) -> None:
        """Call the subscribers."""
        for on_change in self._subscribers:
            on_change()

    def _change(self, **values: Any) -> None:
        self.status = replace(self.status, **values)
        self.notify()
