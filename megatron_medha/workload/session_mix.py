"""Draws agent sessions like the published ones: many turns, long prompts, short answers, short gaps, subagents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from random import Random

from megatron_medha.core.errors import check_ranges
from megatron_medha.workload.sessions import TurnRow

# Published of coding agents in 2026: a median of 43 turns, prompts of 142K tokens, answers of 444, over 96% of prompt
# tokens seen before; 44% of sessions have subagents; 86.5% of calls come within a second of the last one's end and
# 95.1% within ten. Between the bounds gaps are log-uniform, lengths lognormal about their medians: that is ours.
_GAPS_S = ((0.865, 0.05, 1.0), (0.951, 1.0, 10.0), (1.0, 10.0, 600.0))  # up to which share, from, to
_TURNS_SPREAD, _LENGTH_SPREAD, _OUTPUT_SPREAD = 0.35, 0.5, 0.6  # standard deviations of logarithms
_MOST = 4.0             # times its median is the longest that is drawn; a quarter of it the shortest
_MAX_SUBAGENTS = 3      # of a session that has any
_SUBAGENT_TURNS = 0.25  # of a session's


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsConfig:
    """Sessions from a file, or drawn; and how they are played."""

    num_sessions: int = 64          # drawn, without subagents
    max_live: int | None = None     # at a time, without subagents; None: all of them
    start_s: float = 60.0           # over which the first ones begin, drawn
    turns: float = 43.0             # median of a session
    system_tokens: int = 16_000     # that all sessions begin with
    first_tokens: int = 30_000      # median of what a session's first prompt adds to that
    turn_tokens: int = 4_000        # median of what each later prompt adds, without the answer before
    output_tokens: int = 444        # median of an answer
    length_scale: float = 1.0       # factor on all of these tokens
    gap_scale: float = 1.0          # factor on times between turns
    subagent_share: float = 0.44    # of sessions that have subagents
    names_sessions: bool = True     # False: requests do not say to which session they belong

    def __post_init__(self) -> None:
        check_ranges("workload.sessions", self, 1, 1 << 20, "num_sessions", "max_live")
        check_ranges("workload.sessions", self, 0.0, 1e9, "start_s", "gap_scale")
        check_ranges("workload.sessions", self, 1.0, 1e5, "turns")
        check_ranges("workload.sessions", self, 0, 1 << 30, "system_tokens")
        check_ranges("workload.sessions", self, 1, 1 << 30, "first_tokens", "turn_tokens", "output_tokens")
        check_ranges("workload.sessions", self, 1e-6, 1e3, "length_scale")
        check_ranges("workload.sessions", self, 0.0, 1.0, "subagent_share")


def draw_sessions(config: SessionsConfig, seed: int) -> list[TurnRow]:
    """The turns of all sessions, each session's in order; the same ones for the same seed.

    Every session is drawn from a stream of random numbers of its own: of more sessions, the first are the same.
    A subagent shares what its parent's session began with, and adds a task of its own.
    """
    found: list[TurnRow] = []
    for index in range(config.num_sessions):
        draw = Random(f"session {seed} {index}")
        found += _session(draw, config, f"s{index}", draw.uniform(0.0, config.start_s))
    return found


def _session(draw: Random, config: SessionsConfig, name: str, start_s: float) -> Iterator[TurnRow]:
    num_turns = _about(draw, config.turns, _TURNS_SPREAD)
    begun_after: list[int] = []
    if draw.random() < config.subagent_share:
        begun_after = [draw.randrange(num_turns) for _ in range(draw.randint(1, _MAX_SUBAGENTS))]
    system = _scaled(config, config.system_tokens) if config.system_tokens else 0
    prompt = system + _tokens(draw, config, config.first_tokens)
    first_prompt = prompt
    num_subagents = 0
    for turn in range(num_turns):
        output = _tokens(draw, config, config.output_tokens, _OUTPUT_SPREAD)
        yield TurnRow(
            name, prompt, output, start_s=start_s if turn == 0 else 0.0, tool_s=_gap_s(draw, config) if turn else 0.0,
            system_tokens=system if turn == 0 else 0,
        )  # fmt: skip
        prompt += output + _tokens(draw, config, config.turn_tokens)
        for _ in range(begun_after.count(turn)):
            yield from _subagent(draw, config, f"{name}a{num_subagents}", name, first_prompt)
            num_subagents += 1


def _subagent(draw: Random, config: SessionsConfig, name: str, parent: str, shared_tokens: int) -> Iterator[TurnRow]:
    prompt = shared_tokens + _tokens(draw, config, config.turn_tokens)
    for turn in range(_about(draw, config.turns * _SUBAGENT_TURNS, _TURNS_SPREAD)):
        output = _tokens(draw, config, config.output_tokens, _OUTPUT_SPREAD)
        yield TurnRow(
            name, prompt, output, parent=parent if turn == 0 else None,
            shared_tokens=shared_tokens if turn == 0 else None, tool_s=_gap_s(draw, config),
        )  # fmt: skip
        prompt += output + _tokens(draw, config, config.turn_tokens)


def _tokens(draw: Random, config: SessionsConfig, median: float, spread: float = _LENGTH_SPREAD) -> int:
    return _about(draw, median * config.length_scale, spread)


def _scaled(config: SessionsConfig, num_tokens: int) -> int:
    return max(1, round(num_tokens * config.length_scale))


def _about(draw: Random, median: float, spread: float) -> int:
    factor = exp(draw.gauss(0.0, spread))
    return max(1, round(median * min(max(factor, 1.0 / _MOST), _MOST)))


def _gap_s(draw: Random, config: SessionsConfig) -> float:
    place = draw.random()
    low_s, high_s = next((low, high) for share, low, high in _GAPS_S if place < share)
    return config.gap_scale * exp(draw.uniform(log(low_s), log(high_s)))
