"""What was typed for a run of medha simulate or medha bench: its command line, and its name among others."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_medha.system.origin import machine_facts, source_commit
from megatron_medha.system.secret_values import hide_secrets

_NOT_IN_NAMES = ("out=", "plots=", "tracking=", "tracking.", "objective=", "api_key=", "hydra")
_MAX_NAME_CHARS = 100


@dataclass(frozen=True, slots=True)
class JobWords:
    """The words of one run."""

    command: str  # without out=, so that the same run has the same command wherever its results go; without secrets
    name: str     # options that make it differ from the other jobs of its sweep, or from the defaults; may be empty

    @classmethod
    def of(cls, command: str, words: Sequence[str], varied: Collection[str] = ()) -> JobWords:
        """varied: the keys in which the jobs of a sweep differ; empty: whatever was typed."""
        shown = [hide_secrets(word, words) for word in words if not word.startswith("out=")]
        told = [
            word for word in shown
            if "=" in word and not word.startswith(_NOT_IN_NAMES)
            and (not varied or word.partition("=")[0].lstrip("+~") in varied)
        ]  # fmt: skip
        name = ", ".join(_short(word) for word in told)
        return cls(shlex.join(["medha", command, *shown]), name[:_MAX_NAME_CHARS])

    def origin(self) -> dict[str, Any]:
        """What run.json says of where the run comes from."""
        return {"commit": source_commit(), "command": self.command, "machine": machine_facts()}


def _short(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key.rpartition('.')[2].lstrip('+~')}={value}"
