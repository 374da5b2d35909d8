"""Sessions: what is drawn, what a file may say, which turn comes when, and whose text is whose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.core.request import Request
from megatron_medha.workload.key_chain import TextSpan
from megatron_medha.workload.session_file import read_session_rows, write_session_rows
from megatron_medha.workload.session_mix import SessionsConfig, draw_sessions
from megatron_medha.workload.session_play import SessionPlay
from megatron_medha.workload.sessions import AgentSession, TurnRow, build_sessions
from megatron_medha.workload.workload import Workload, WorkloadConfig

SMALL = SessionsConfig(num_sessions=12, turns=6.0, length_scale=0.01, start_s=5.0)


def tokens_of(spans: Sequence[TextSpan]) -> list[tuple[str, int]]:
    return [(text, first + index) for text, first, count in spans for index in range(count)]


def built(*rows: TurnRow, tokens_per_hash_id: int = 4) -> dict[str, AgentSession]:
    return {one.name: one for one in build_sessions(rows, tokens_per_hash_id)}


def played(play: SessionPlay, service_s: float = 0.0) -> list[Request]:
    """All requests of a play in which each takes so long."""
    found: list[Request] = []
    running: list[tuple[float, str]] = []
    while play.next_s < inf or running:
        if running and min(running)[0] <= play.next_s:
            running.remove(first := min(running))
            play.ended(first[1], first[0], True)
        else:
            found.append(play.pop())
            running.append((found[-1].arrival_s + service_s, found[-1].request_id))
    return found


# ---- texts ----


def test_a_prompt_is_the_one_before_with_its_answer_and_something_new() -> None:
    (session,) = built(TurnRow("a", 10, 3, system_tokens=4), TurnRow("a", 20, 2)).values()
    first, second = session.turns
    assert tokens_of(first.prompt) == [*(("system", i) for i in range(4)), *(("a.0", i) for i in range(6))]
    assert second.prompt[: len(first.prompt) + 1] == (*first.prompt, *first.output)
    assert second.num_prompt_tokens == 20 and second.num_new_tokens == 7 and first.num_new_tokens == 10


def test_a_subagent_begins_with_as_much_of_its_parent_as_it_says() -> None:
    rows = (TurnRow("a", 10, 3), TurnRow("b", 9, 1, parent="a", shared_tokens=5), TurnRow("c", 15, 1, parent="a"))
    sessions = built(*rows)
    parent, part, whole = (tokens_of(sessions[name].turns[0].prompt) for name in "abc")
    assert part[:5] == parent[:5] and not set(part[5:]) & set(parent)
    assert whole[:13] == parent + tokens_of(sessions["a"].turns[0].output)


def test_a_turn_may_keep_only_the_beginning_of_its_session() -> None:
    (session,) = built(TurnRow("a", 10, 3), TurnRow("a", 8, 1, shared_tokens=4), TurnRow("a", 12, 1)).values()
    first, second, third = session.turns
    assert tokens_of(second.prompt)[:4] == tokens_of(first.prompt)[:4] and second.num_new_tokens == 4
    assert tokens_of(third.prompt)[:9] == tokens_of(second.prompt + second.output)


def test_hash_ids_say_what_is_shared_and_what_the_answer_was() -> None:
    rows = (
        TurnRow("a", 6, 3, hash_ids=(1, 2)),
        TurnRow("a", 14, 2, hash_ids=(1, 7, 8, 9)),  # continues the first turn: block 7 is 2 when it is full
        TurnRow("a", 8, 2, hash_ids=(1, 5)),         # something else in place of 7: only the first block is kept
    )
    (session,) = built(*rows).values()
    first, second, third = session.turns
    assert tokens_of(second.prompt)[:9] == tokens_of(first.prompt + first.output)
    assert second.num_new_tokens == 14 - 9
    assert third.num_new_tokens == 4 and tokens_of(third.prompt)[:4] == tokens_of(first.prompt)[:4]
    assert second.output == (TextSpan("a.1>", 0, 2),)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 20))
def test_num_new_tokens_are_those_after_the_text_of_the_turn_or_parent_before(seed: int) -> None:
    sessions = {one.name: one for one in build_sessions(draw_sessions(replace(SMALL, num_sessions=3), seed), 512)}
    for session in sessions.values():
        before: list[tuple[str, int]] = []
        if session.parent is not None:
            begun_in = sessions[session.parent].turns[session.parent_turn]
            before = tokens_of(begun_in.prompt + begun_in.output)
        for turn in session.turns:
            tokens = tokens_of(turn.prompt)
            kept = len(tokens) - turn.num_new_tokens
            assert tokens[:kept] == before[:kept] and not set(tokens[kept:]) & set(before)
            before = tokens + tokens_of(turn.output)


# ---- what is drawn ----


def test_drawn_sessions_are_like_the_published_ones() -> None:
    sessions = build_sessions(draw_sessions(SessionsConfig(num_sessions=300), 5), 512)
    roots = [one for one in sessions if one.parent is None]
    turns = [turn for one in sessions for turn in one.turns]
    assert median(len(one.turns) for one in roots) == pytest.approx(43, abs=2)
    assert median(turn.num_prompt_tokens for turn in turns) == pytest.approx(142_000, rel=0.06)
    assert median(turn.num_output_tokens for turn in turns) == pytest.approx(444, rel=0.03)
    new = sum(turn.num_new_tokens for turn in turns) / sum(turn.num_prompt_tokens for turn in turns)
    assert 1.0 - new > 0.96
    assert len({one.parent for one in sessions} - {None}) / len(roots) == pytest.approx(0.44, abs=0.06)
    gaps = [turn.gap_s for one in sessions for turn in one.turns[1:]]
    for seconds, share in ((1.0, 0.865), (10.0, 0.951), (600.0, 1.0)):
        assert sum(gap <= seconds for gap in gaps) / len(gaps) == pytest.approx(share, abs=0.01)


def test_of_more_sessions_the_first_are_the_same_and_another_seed_gives_others() -> None:
    few, many = draw_sessions(SMALL, 1), draw_sessions(replace(SMALL, num_sessions=20), 1)
    assert many[: len(few)] == few != draw_sessions(SMALL, 2)


def test_lengths_can_be_scaled_and_the_turns_stay() -> None:
    whole, scaled = (draw_sessions(replace(SMALL, length_scale=scale), 3) for scale in (1.0, 0.02))
    assert [row.session for row in whole] == [row.session for row in scaled]
    ratio = sum(row.prompt_tokens for row in scaled) / sum(row.prompt_tokens for row in whole)
    assert ratio == pytest.approx(0.02, rel=0.05)


# ---- which turn comes when ----


def test_a_turn_comes_its_gap_after_the_one_before_has_ended() -> None:
    rows = (TurnRow("a", 4, 1, start_s=2.0), TurnRow("a", 8, 1, think_s=1.0, tool_s=0.5), TurnRow("a", 12, 1))
    arrivals = [(one.request_id, one.arrival_s) for one in played(SessionPlay(build_sessions(rows, 4)), 10.0)]
    assert arrivals == [("a.0", 2.0), ("a.1", 13.5), ("a.2", 23.5)]


def test_a_parent_waits_for_all_subagents_that_began_in_its_turn() -> None:
    rows = (
        TurnRow("a", 4, 1), TurnRow("b", 4, 1, parent="a", shared_tokens=2, tool_s=1.0), TurnRow("b", 8, 1),
        TurnRow("c", 4, 1, parent="a", shared_tokens=2), TurnRow("a", 9, 1, think_s=3.0),
    )  # fmt: skip
    arrivals = {one.request_id: one.arrival_s for one in played(SessionPlay(build_sessions(rows, 4)), 10.0)}
    assert arrivals == {"a.0": 0.0, "b.0": 11.0, "c.0": 10.0, "b.1": 21.0, "a.1": 34.0}


def test_so_many_sessions_at_a_time_and_the_next_when_one_ends() -> None:
    sessions = build_sessions(draw_sessions(replace(SMALL, subagent_share=0.0, start_s=0.0), 4), 512)
    arrivals = {one.request_id: one.arrival_s for one in played(SessionPlay(sessions, max_live=3), 1.0)}
    spans = [(arrivals[one.turns[0].request_id], arrivals[one.turns[-1].request_id] + 1.0) for one in sessions]
    assert len(arrivals) == sum(len(one.turns) for one in sessions)
    begins, ends = sorted(begin for begin, _ in spans), sorted(end for _, end in spans)
    assert begins[:3] == [0.0] * 3 and begins[3:] == pytest.approx(ends[:-3])


def test_a_turn_that_fails_ends_its_session_and_its_parent_goes_on() -> None:
    rows = (TurnRow("a", 4, 1), TurnRow("b", 4, 1, parent="a", shared_tokens=2), TurnRow("b", 8, 1), TurnRow("a", 9, 1))
    play = SessionPlay(build_sessions(rows, 4))
    play.ended(play.pop().request_id, 1.0, True)
    failed = play.pop()
    assert failed.request_id == "b.0"
    play.ended("b.0", 2.0, False)
    assert play.num_not_sent == 1 and play.pop().request_id == "a.1" and play.next_s == inf


def test_no_turn_comes_after_the_end() -> None:
    sessions = build_sessions(draw_sessions(SMALL, 4), 512)
    arrivals = [one.arrival_s for one in played(SessionPlay(sessions, until_s=20.0), 0.5)]
    assert arrivals and max(arrivals) < 20.0 and arrivals == sorted(arrivals)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 20), st.sampled_from([4, 64]), st.booleans())
def test_the_next_prompt_has_the_keys_of_the_one_before_and_of_its_answer(
    seed: int, granule_tokens: int, says_all: bool
) -> None:
    sessions = {one.name: one for one in build_sessions(draw_sessions(replace(SMALL, num_sessions=2), seed), 512)}
    play = SessionPlay(list(sessions.values()), granule_tokens)
    keys: dict[str, bytes] = {}
    while play.next_s < inf:
        request = play.pop()
        name, _, index = request.request_id.rpartition(".")
        turn = sessions[name].turns[int(index)]
        assert len(request.prefix_keys) == request.num_prompt_tokens // granule_tokens * KEY_BYTES
        if int(index):
            assert request.prefix_keys.startswith(keys[name])
        elif sessions[name].parent is not None:
            shared = (request.num_prompt_tokens - turn.num_new_tokens) // granule_tokens * KEY_BYTES
            assert request.prefix_keys[:shared] == keys[sessions[name].parent or ""][:shared]
        total = request.num_prompt_tokens + request.max_output_tokens
        keys[name] = request.prefix_keys
        for end in range(request.num_prompt_tokens + 1, total + 1):
            if end % granule_tokens == 0 and says_all and request.prefix_keys:
                filled = play.filled_keys(request.request_id, end)
                assert len(filled) == KEY_BYTES
                keys[name] += filled
        play.ended(request.request_id, request.arrival_s, True)


def test_requests_say_their_session_and_its_end_unless_they_shall_not() -> None:
    sessions = build_sessions(draw_sessions(SMALL, 7), 512)
    for one in played(SessionPlay(sessions)):
        assert one.session_id == one.request_id.rpartition(".")[0]
    ends = {one.request_id for one in played(SessionPlay(sessions)) if one.ends_session}
    assert ends == {one.turns[-1].request_id for one in sessions}
    assert {(one.session_id, one.ends_session) for one in played(SessionPlay(sessions, names_sessions=False))} == {
        ("", False)
    }


# ---- files ----


def test_a_file_says_all_that_was_drawn(tmp_path: Path) -> None:
    rows = draw_sessions(SMALL, 11)
    write_session_rows(tmp_path / "s.jsonl", rows)
    assert read_session_rows(tmp_path / "s.jsonl", 512) == rows
    drawn = Workload(WorkloadConfig(sessions=SMALL), 11)
    read = Workload(WorkloadConfig(sessions=SessionsConfig(), path=tmp_path / "s.jsonl"), 0)
    assert read.facts == drawn.facts and list(read.requests(64)) == list(drawn.requests(64))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", "no turns in it"),
        ("[1]", "is not an object"),
        ('{"session": "a", "prompt_tokens": 4}', "output_tokens is missing"),
        ('{"session": "a", "prompt_tokens": 4, "output_tokens": 1, "thnik_s": 1}', "unknown field thnik_s"),
        ('{"session": "a", "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens=0 is not a whole number from 1"),
        ('{"session": "a", "prompt_tokens": 4, "output_tokens": 1, "think_s": -1}', "is not a number of seconds"),
        ('{"session": "a", "prompt_tokens": 4, "output_tokens": 1, "hash_ids": [1, 2]}', "2 hash_ids"),
        ('{"session": "b", "parent": "a", "prompt_tokens": 4, "output_tokens": 1}', "parent=a has no turn above it"),
        ('{"session": "a", "prompt_tokens": 4, "output_tokens": 1}\n'
         '{"session": "a", "prompt_tokens": 4, "output_tokens": 1}', "the text before it has 5"),
        ('{"session": "a", "prompt_tokens": 4, "output_tokens": 1}\n'
         '{"session": "a", "prompt_tokens": 8, "output_tokens": 1, "start_s": 3}', "first turn of session a only"),
        ('{"session": "a", "prompt_tokens": 4, "output_tokens": 1, "shared_tokens": 2}', "the text before it has 0"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused_by_what_is_wrong(tmp_path: Path, lines: str, why: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match=why):
        Workload(WorkloadConfig(sessions=SessionsConfig(), path=path), 0)


def test_nulls_are_as_good_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    values = {"session": "a", "prompt_tokens": 4, "output_tokens": 1, "parent": None, "shared_tokens": None}
    path.write_text(json.dumps(values))
    assert read_session_rows(path, 512) == [TurnRow("a", 4, 1)]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (WorkloadConfig(sessions=SMALL, qps=1.0), "workload.qps=1"),
        (WorkloadConfig(sessions=SMALL, num_requests=3), "workload.num_requests=3"),
        (WorkloadConfig(sessions=SMALL, time_scale=2.0), "workload.time_scale=2"),
        (WorkloadConfig(sessions=SMALL, path=Path("s.jsonl")), "only max_live and names_sessions"),
    ],
)
def test_what_means_nothing_for_sessions_is_refused(config: WorkloadConfig, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Workload(config, 0)


def test_turns_of_sessions_are_not_read_as_a_trace_of_lengths(tmp_path: Path) -> None:
    write_session_rows(tmp_path / "s.jsonl", draw_sessions(SMALL, 0))
    with pytest.raises(ConfigError, match="workload=sessions"):
        Workload(WorkloadConfig(path=tmp_path / "s.jsonl", qps=1.0), 0)
