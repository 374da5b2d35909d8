"""Up to which token a prompt is what its session had before."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path

import pytest
from live_server import LiveEngine
from running_server import StartServer, eventually

from megatron_medha.cli.explain import run as explain
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.server.session_history import SessionHistory, SessionSequence


def ids(*tokens: int) -> array[int]:
    return array("i", tokens)


def test_a_prompt_shares_what_any_of_the_latest_sequences_had() -> None:
    draw = random.Random(0)
    for _ in range(300):
        history, latest = SessionHistory(), []
        for _ in range(draw.randrange(1, 5)):
            prompt, output = ([draw.randrange(2) for _ in range(draw.randrange(1, 8))] for _ in "po")
            sequence = history.add("a", ids(*prompt))
            for token in output:
                history.extend(sequence, token)
            latest.append(prompt + output)
            asked = [draw.randrange(2) for _ in range(draw.randrange(1, 12))]
            assert history.num_shared_tokens("a", ids(*asked)) == max(common(one, asked) for one in latest)
        assert history.num_shared_tokens("b", ids(0)) is None


def test_a_conversation_that_goes_on_is_kept_once() -> None:
    history, prompt = SessionHistory(max_tokens=1000), [1] * 100
    for turn in range(8):
        sequence = history.add("a", ids(*prompt))
        for token in range(10):
            history.extend(sequence, token)
        prompt += [*range(10), turn]
        assert history.num_shared_tokens("a", ids(*prompt)) == len(prompt) - 1


def test_the_session_that_was_idle_longest_is_forgotten_first() -> None:
    history = SessionHistory(max_tokens=30)
    first = history.add("a", ids(*range(10)))
    history.add("b", ids(*range(10)))
    history.add("a", ids(*range(100, 110)))
    history.add("c", ids(*range(10)))
    assert [history.num_shared_tokens(name, ids(1, 2)) for name in "abc"] == [0, None, 0]
    history.forget("a")
    history.extend(first, 5)  # its output still comes
    history.add("d", ids(*range(20)))
    assert [history.num_shared_tokens(name, ids(0, 1)) for name in "acd"] == [None, 2, 2]
    history.add("e", ids(*range(31)))
    assert [history.num_shared_tokens(name, ids(0, 1)) for name in "cde"] == [None, None, None]


def common(first: list[int], second: list[int]) -> int:
    both = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in both if one != other), min(len(first), len(second)))


def test_no_sequence_shares_less_than_it_is_asked_for() -> None:
    sequence = SessionSequence(ids(1, 2, 3), ids(4, 5))
    asked = ids(1, 2, 3, 4, 6)
    assert [sequence.num_common(asked, least) for least in range(7)] == [4, 4, 4, 4, 0, 0, 0]


@pytest.mark.parametrize("cut", [0, 3, 70, 100, 103, 110])
def test_explain_names_the_first_token_that_a_session_did_not_have(
    start_server: StartServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    log = tmp_path / "decisions.jsonl"
    engine = LiveEngine(kv=KVConfig(), decision_log=log)
    server = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics)
    eventually(lambda: server.get("/ready").status_code == 200)

    def answered(prompt: list[int], session: str) -> tuple[str, list[int]]:
        body = {"prompt": prompt, "max_tokens": 10, "ignore_eos": True, "return_token_ids": True, "session_id": session}
        response = server.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()["id"], response.json()["choices"][0]["token_ids"]

    prompt = [place % 250 for place in range(100)]
    first, said = answered(prompt, "a")
    text = prompt + said
    changed = [*text[:cut], *([(text[cut] + 1) % 250] if cut < len(text) else []), *text[cut + 1 :], 7]
    other, _ = answered(changed, "b")
    second, _ = answered(changed, "a")
    trace = server.get(f"/debug/requests/{second}").json()["choices"][0]
    assert trace["num_session_tokens"] == cut
    assert server.get(f"/debug/requests/{other}").json()["choices"][0]["num_session_tokens"] is None
    names = [row["request"]["request_id"] for row in map(json.loads, log.read_text().splitlines()) if "request" in row]
    assert names[0].startswith(first)
    assert explain([str(log), names[2]]) == 0
    assert f"token {cut}, counted from 0, is the first that its session did not have" in capsys.readouterr().out
    assert explain([str(log), names[1]]) == 0
    assert "its session" not in capsys.readouterr().out
