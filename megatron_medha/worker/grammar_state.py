"""How far a request's output has got in its grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance


@dataclass(slots=True)
class GrammarState:
    """How far a request's output has got in its grammar."""

    matcher: llguidance.LLMatcher
    num_consumed: int = 0  # output tokens the matcher has seen
