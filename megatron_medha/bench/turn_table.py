"""What turns of sessions took, by their number: TTFT, prompt and new tokens, what was cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_medha.bench.load_generator import SentRequest
from megatron_medha.stats.summary import percentile
from megatron_medha.stats.text_table import percent_text, seconds_text, text_table
from megatron_medha.workload.session_play import SessionPlay

_FIRST_OF_GROUPS = (1, 2, 6, 11, 21, 41)  # turns, counted from 1, that are shown together up to the next


class SentTurn(NamedTuple):
    """A turn that has ended."""

    session: str
    number: int          # in its session, from 1
    num_new_tokens: int  # of its prompt, as the workload has it; of prompts that are sent as text about that
    sent: SentRequest


@dataclass(slots=True)
class TurnGroup:
    """Turns of like numbers."""

    ttft_s: list[float] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_told_tokens: int = 0  # of prompts of which the server says how much was cached


class TurnMeasurement:
    """Adds up turns by their number."""

    def __init__(self) -> None:
        self._groups = {first: TurnGroup() for first in _FIRST_OF_GROUPS}

    def add(self, turn: SentTurn) -> None:
        """Take a turn in; one without a first token does not count."""
        outcome = turn.sent.outcome
        if outcome.ttft_s is None:
            return
        group = self._groups[max(first for first in _FIRST_OF_GROUPS if first <= turn.number)]
        group.ttft_s.append(outcome.ttft_s)
        group.num_prompt_tokens.append(outcome.request.num_prompt_tokens)
        group.num_new_tokens.append(turn.num_new_tokens)
        if outcome.num_cached_tokens is not None:
            group.num_cached_tokens += outcome.num_cached_tokens
            group.num_told_tokens += outcome.request.num_prompt_tokens

    def values(self, play: SessionPlay) -> dict[str, Any]:
        """Everything as plain numbers, for summary.json."""
        groups = {first: group for first, group in self._groups.items() if group.ttft_s}
        num_told = sum(group.num_told_tokens for group in groups.values())
        num_prompt = sum(sum(group.num_prompt_tokens) for group in groups.values())
        num_new = sum(sum(group.num_new_tokens) for group in groups.values())
        return {
            "num_sessions": len(play.sessions),
            "num_turns_not_sent": play.num_not_sent,
            "hit_rate": sum(group.num_cached_tokens for group in groups.values()) / num_told if num_told else None,
            "repeated_share": 1.0 - num_new / num_prompt if num_prompt else None,
            "turns": [_group_values(first, group) for first, group in groups.items()],
        }


def _group_values(first: int, group: TurnGroup) -> dict[str, Any]:
    following = [other for other in _FIRST_OF_GROUPS if other > first]
    ascending = sorted(group.ttft_s)
    return {
        "first_turn": first,
        "last_turn": following[0] - 1 if following else None,
        "num_turns": len(ascending),
        "prompt_tokens_p50": _median(group.num_prompt_tokens),
        "new_tokens_p50": _median(group.num_new_tokens),
        "hit_rate": group.num_cached_tokens / group.num_told_tokens if group.num_told_tokens else None,
        "ttft_s": {f"p{percent}": percentile(ascending, percent) for percent in (50, 90, 99)},
    }


def _median(values: Sequence[int]) -> float:
    return percentile(sorted(values), 50)


def turns_table(values: dict[str, Any]) -> str:
    """TurnMeasurement.values() as text for a terminal; ends with a newline."""
    rows = [["turn", "turns", "prompt p50", "new p50", "cached", "TTFT p50", "p90", "p99"]]
    for one in values["turns"]:
        last = one["last_turn"]
        name = str(one["first_turn"]) if last == one["first_turn"] else f"{one['first_turn']}-{last or ''}"
        times = [seconds_text(one["ttft_s"][percent]) for percent in ("p50", "p90", "p99")]
        tokens = [f"{one['prompt_tokens_p50']:,.0f}", f"{one['new_tokens_p50']:,.0f}"]
        rows.append([name, f"{one['num_turns']:,}", *tokens, percent_text(one["hit_rate"]), *times])
    told = "the server does not say" if values["hit_rate"] is None else percent_text(values["hit_rate"])
    remark = (
        f"prompt tokens cached: {told}; {percent_text(values['repeated_share'])} are repeated within a session; "
        f"{values['num_turns_not_sent']} turns not sent, as one before them failed"
    )
    return f"{text_table(rows)}{remark}\n"
