"""Sessions against a server: prompts contain the answers that came, turns wait for each other, hits are counted."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest
from scripted_server import Event, ScriptedServer

from megatron_medha.bench.client import Target, TokenRange
from megatron_medha.bench.idle import BenchError
from megatron_medha.bench.load_generator import LoadClient
from megatron_medha.bench.session_loop import session_loop
from megatron_medha.bench.session_prompts import IdPrompts, PromptForm, TextPrompts, prompt_maker, words
from megatron_medha.bench.turn_table import SentTurn, TurnMeasurement, turns_table
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.workload.key_chain import TextSpan
from megatron_medha.workload.session_mix import SessionsConfig, draw_sessions
from megatron_medha.workload.session_play import SessionPlay
from megatron_medha.workload.sessions import TurnRow, build_sessions

ROWS = (
    TurnRow("a", 20, 3, system_tokens=8), TurnRow("b", 16, 2, parent="a", shared_tokens=12), TurnRow("b", 30, 4),
    TurnRow("a", 40, 5), TurnRow("c", 12, 2, system_tokens=8), TurnRow("a", 30, 1, shared_tokens=10),
)  # fmt: skip


class Answering:
    """Answers with tokens and letters that nobody can guess, and says how much of a prompt it has seen before."""

    def __init__(
        self, gives_ids: bool = True, tells_hits: bool = True, fails: int | None = None, like_llama: bool = False
    ) -> None:
        self._draw, self._gives_ids, self._tells_hits, self._fails = Random(1), gives_ids, tells_hits, fails
        self._like_llama = like_llama
        self._seen: list[Any] = []
        self.turns: list[tuple[Any, Any]] = []  # prompt and answer of each body

    def __call__(self, body: dict[str, Any]) -> list[Event]:
        """The events for a body."""
        prompt, count = body["prompt"], body["max_tokens"]
        if len(self.turns) == self._fails:
            self.turns.append((prompt, None))
            return [{"error": {"message": "no"}}]
        ids = [self._draw.randrange(32, 127) for _ in range(count)]
        answer = ids if isinstance(prompt, list) else "".join(map(chr, ids))
        num_cached = max((_num_equal(prompt, seen) for seen in self._seen), default=0)
        self._seen.append(prompt + answer)
        self.turns.append((prompt, answer))
        events: list[Event] = []
        for token_id in ids:
            choice: dict[str, Any] = {"text": chr(token_id), "finish_reason": None}
            events.append({"choices": [choice]})
            if self._like_llama and body.get("return_tokens") and body.get("verbose"):
                events[-1]["__verbose"] = {"tokens": [token_id]}
            elif self._gives_ids and not self._like_llama and body.get("return_token_ids"):
                choice["token_ids"] = [token_id]
        usage: dict[str, Any] = {"completion_tokens": count, "prompt_tokens": len(prompt)}
        if self._tells_hits:
            usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
        return [*events, {"choices": [], "usage": usage}]


def _num_equal(one: Any, other: Any) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                min(len(one), len(other)))  # fmt: skip


def played(
    answering: Answering, rows: tuple[TurnRow, ...] | list[TurnRow] = ROWS, form: PromptForm = PromptForm.AUTO,
    server: ScriptedServer | None = None,
) -> tuple[list[SentTurn], SessionPlay, Any]:
    server = server or ScriptedServer(answer=answering)
    play = SessionPlay(build_sessions(rows, 4))
    turns: list[SentTurn] = []

    async def go() -> Any:
        async with server.running():
            target = Target(url=server.url)
            async with target.session() as session:
                client = LoadClient(
                    target=target, session=session, model="scripted", tokens=TokenRange(), slo=Slo(), seed=0,
                    isolated_s=lambda num_tokens: 0.25,
                )  # fmt: skip
                maker = await prompt_maker(form, target, session, "scripted", TokenRange(), 0)
                answering.turns.clear()
                await session_loop(client, play, maker, turns.append)
                return maker

    return turns, play, asyncio.run(go())


@pytest.mark.parametrize(("gives_ids", "like_llama"), [(True, False), (True, True), (False, False)])
def test_a_prompt_is_the_one_before_its_real_answer_and_new_text(gives_ids: bool, like_llama: bool) -> None:
    answering = Answering(gives_ids, like_llama=like_llama)
    turns, _, maker = played(answering, [row for row in ROWS if row.session == "a"])
    assert isinstance(maker, IdPrompts if gives_ids else TextPrompts)
    (first, answer), (second, _), (third, _) = answering.turns
    assert second[: len(first) + 3] == first + answer and len(second) > len(first) + 3
    assert _num_equal(third, first) == 10  # that much is kept, and something else follows
    if gives_ids:
        assert [len(prompt) for prompt, _ in answering.turns] == [20, 40, 30]
    else:
        assert [turn.num_new_tokens for turn in turns] == [20, 17, 20]


def test_a_subagent_begins_as_its_parent_and_all_sessions_with_the_system_prompt() -> None:
    answering = Answering()
    played(answering)
    prompts = [prompt for prompt, _ in answering.turns]
    assert len(prompts) == 6 and len({tuple(prompt[:8]) for prompt in prompts}) == 1
    parent = next(prompt for prompt in prompts if len(prompt) == 20)
    subagent = next(prompt for prompt in prompts if len(prompt) == 16)
    assert _num_equal(parent, subagent) == 12


def test_turns_come_in_order_and_what_the_server_says_of_hits_is_counted() -> None:
    rows = draw_sessions(SessionsConfig(num_sessions=3, turns=4.0, length_scale=0.002, start_s=0.0, gap_scale=0.0), 2)
    turns, play, _ = played(Answering(), rows)
    assert len(turns) == len(rows)
    for session in play.sessions:
        assert [turn.number for turn in turns if turn.session == session.name] == list(
            range(1, len(session.turns) + 1)
        )
    measured = TurnMeasurement()
    for turn in turns:
        measured.add(turn)
    values = measured.values(play)
    # All that is repeated, and the system prompt of all sessions but the first besides.
    assert 0.5 < values["repeated_share"] <= values["hit_rate"] < 1.0
    assert sum(one["num_turns"] for one in values["turns"]) == len(rows)
    assert values["turns"][0]["last_turn"] == 1 and "prompt tokens cached" in turns_table(values)


@pytest.mark.parametrize("gives_ids", [True, False])
def test_who_takes_more_than_openais_fields_is_told_that_a_session_ends(gives_ids: bool) -> None:
    answering = Answering(gives_ids)
    server = ScriptedServer(answer=answering)
    played(answering, [row for row in ROWS if row.session == "a"], server=server)
    ends = [body.get("ends_session") for body in server.bodies[-3:]]
    assert ends == ([None, None, True] if gives_ids else [None] * 3)


def test_a_server_that_does_not_say_what_was_cached_has_no_hit_rate() -> None:
    turns, play, _ = played(Answering(tells_hits=False))
    measured = TurnMeasurement()
    for turn in turns:
        measured.add(turn)
        assert turn.sent.outcome.num_cached_tokens is None
    assert measured.values(play)["hit_rate"] is None
    assert "the server does not say" in turns_table(measured.values(play))


def test_a_turn_that_fails_ends_its_session() -> None:
    turns, play, _ = played(Answering(fails=1), [row for row in ROWS if row.session == "a"])
    assert [turn.sent.outcome.why for turn in turns] == [None, "no"] and play.num_not_sent == 1


def test_ids_are_asked_for_only_where_the_server_returns_those_of_its_answers() -> None:
    with pytest.raises(BenchError, match="use prompts=text"):
        played(Answering(gives_ids=False), form=PromptForm.IDS)
    assert isinstance(played(Answering(), form=PromptForm.TEXT)[2], TextPrompts)


def test_a_text_is_the_beginning_of_a_longer_one_of_its_name() -> None:
    assert words(500, "x").startswith(words(123, "x")) and words(80, "x") != words(80, "y")
    maker = TextPrompts(0, 3.7)
    pieces = [maker.drawn(TextSpan("t", 0, 10)), maker.drawn(TextSpan("t", 10, 7))]
    assert maker.joined(pieces) == maker.joined([maker.drawn(TextSpan("t", 0, 17))])
