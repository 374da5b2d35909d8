"""What a client of any OpenAI-compatible server makes of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from scripted_server import Event, ScriptedServer, token, usage

from megatron_medha.bench.client import (
    ListedModel,
    StreamResult,
    Target,
    TokenRange,
    completion_body,
    find_model,
    run_completion,
)
from megatron_medha.core.errors import ConfigError


def streamed(server: ScriptedServer, max_tokens: int = 3, **target: object) -> StreamResult:
    async def one() -> StreamResult:
        async with server.running():
            made = Target(url=server.url, **target)  # type: ignore[arg-type]
            async with made.session() as session:
                body = completion_body(made, "scripted", [65, 66], max_tokens)
                return await run_completion(made, session, body, max_tokens)

    return asyncio.run(one())


@pytest.mark.parametrize(
    "events",
    [
        [token(), token(), token(finish_reason="length"), usage(3)],
        [token(), token(), token("", "length"), usage(3)],            # the last token's bytes are no character yet
        [token(), token(), token(), token("", "length"), usage(3)],   # an event of its own says why it ended
        [token(), token(""), token(finish_reason="length")],          # no usage
    ],
)
def test_tokens_are_timed_one_by_one_however_the_end_is_told(events: Sequence[Event]) -> None:
    result = streamed(ScriptedServer(events))

    assert result.error is None
    assert result.num_tokens == 3
    assert len(result.token_times_s) == 3
    assert result.sent_s < result.token_times_s[0] <= result.token_times_s[-1]


def test_a_stream_that_ends_early_is_an_error() -> None:
    assert streamed(ScriptedServer([token(), usage(1)])).error == "1 tokens instead of 3"


def test_a_refusal_is_told_in_the_servers_own_words() -> None:
    result = streamed(ScriptedServer(status=429, error={"error": {"message": "queue is full"}}))

    assert (result.status, result.error) == (429, "queue is full")


def test_an_error_amid_a_stream_ends_it() -> None:
    result = streamed(ScriptedServer([token(), {"error": {"message": "a rank is gone"}}]))

    assert result.error == "a rank is gone"
    assert len(result.token_times_s) == 1


def test_events_that_are_not_json_are_an_error_of_that_request() -> None:
    assert "JSON" in (streamed(ScriptedServer(["{"])).error or "")


def test_a_request_without_an_end_times_out() -> None:
    result = streamed(ScriptedServer([token()], holds=asyncio.Event()), request_timeout_s=0.05)

    assert result.error == "no end within 0.05 s"


def test_the_body_asks_for_exactly_so_many_greedy_tokens_and_for_usage() -> None:
    server = ScriptedServer([token(), usage(1)])
    streamed(server, max_tokens=1)

    (body,) = server.bodies
    assert body["prompt"] == [65, 66]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (1, 0, True)
    assert body["stream_options"] == {"include_usage": True}


def found(server: ScriptedServer, url: str | None = None, model: str | None = None) -> ListedModel:
    async def one() -> ListedModel:
        async with server.running():
            target = Target(url=url or server.url, model=model)
            async with target.session() as session:
                return await find_model(target, session)

    return asyncio.run(one())


def test_the_model_is_the_first_the_server_lists() -> None:
    assert found(ScriptedServer()) == ("scripted", None)


def test_the_length_of_a_models_context_is_that_which_the_server_lists() -> None:
    models = {"data": [{"id": "a", "max_model_len": 64}, {"id": "b", "max_model_len": 128}, {"id": "c"}]}
    assert found(ScriptedServer(models=models)) == ("a", 64)
    assert found(ScriptedServer(models=models), model="b") == ("b", 128)
    assert found(ScriptedServer(models=models), model="c") == ("c", None)
    assert found(ScriptedServer(models=models), model="of another name") == ("of another name", None)


def test_a_url_where_nobody_answers_is_told_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"url=http://127\.0\.0\.1:9: connection failed .* try `medha serve`"):
        found(ScriptedServer(), url="http://127.0.0.1:9")


def test_a_server_of_another_kind_is_told_apart() -> None:
    with pytest.raises(ConfigError, match="not a list of models"):
        found(ScriptedServer(models={"detail": "Not Found"}))


def test_prompts_are_the_same_for_the_same_seed_and_share_no_beginning() -> None:
    tokens = TokenRange()

    assert tokens.prompt(1000, 1, "r1") == tokens.prompt(1000, 1, "r1")
    assert len({tuple(tokens.prompt(1000, seed, name)[:8]) for seed in (1, 2) for name in ("r1", "r2")}) == 4
    assert {32 <= one <= 126 for one in tokens.prompt(1000, 1, "r1")} == {True}


def test_a_range_of_tokens_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lowest_token=9: must be between 0 and highest_token=3"):
        TokenRange(lowest=9, highest=3)
