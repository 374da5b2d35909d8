"""Where an engine's status is written: by its world, on the engine's thread; anybody may read it."""

from __future__ import annotations

from dataclasses import replace

from megatron_medha.core.ports import EnginePhase, EngineStatus


class StatusBoard:
    """The engine's status; it changes as a whole, so that a reader never sees half of a change."""

    def __init__(self) -> None:
        self.status = EngineStatus(EnginePhase.LOADING, "starting")

    def show(self, phase: EnginePhase, detail: str = "", fraction: float = 0.0) -> None:
        """Another phase, or other words about it; the counts stay."""
        self.status = replace(self.status, phase=phase, detail=detail, fraction=fraction)

    def loading(self, what: str, fraction: float) -> None:
        """The world is coming up."""
        self.show(EnginePhase.LOADING, what, fraction)

    def recovering(self, why: str, fraction: float) -> None:
        """The world is coming up again."""
        self.show(EnginePhase.RECOVERING, why, fraction)

    def count_failure(self) -> None:
        """Ranks were lost."""
        self.status = replace(self.status, num_failures=self.status.num_failures + 1)

    def recovered(self, detail: str) -> None:
        """The world is up again."""
        self.status = replace(
            self.status, phase=EnginePhase.READY, detail=detail, fraction=1.0,
            num_recoveries=self.status.num_recoveries + 1,
        )  # fmt: skip
