"""`medha chat` against a real server."""

from __future__ import annotations

import io

import pytest
from fake_engine import FakeEngine, say
from running_server import StartServer

from megatron_medha.cli.chat import ChatConfig, ChatError, Conversation, chat
from megatron_medha.core.errors import ConfigError


def test_a_conversation_keeps_its_history_and_system_prompt(start_server: StartServer) -> None:
    server = start_server(FakeEngine(rule=say([111, 107, 257])))
    lines = iter(["hello", "", "/system be brief", "again", "/clear", "anew", "/quit"])
    out = io.StringIO()
    chat(ChatConfig(url=server.url, system_prompt="be kind"), read_line=lambda _: next(lines), out=out)
    assert out.getvalue().count("ok\n") == 3
    prompts = [bytes(live.prompt.tolist()).decode() for live in server.engine.submitted]
    assert prompts == [
        "<|system|>be kind\n<|user|>hello\n<|assistant|>",
        "<|system|>be brief\n<|user|>hello\n<|assistant|>ok\n<|user|>again\n<|assistant|>",
        "<|system|>be brief\n<|user|>anew\n<|assistant|>",
    ]
    assert len({live.request.session_id for live in server.engine.submitted} - {""}) == 1


def test_an_error_is_shown_and_the_conversation_goes_on(start_server: StartServer) -> None:
    server = start_server(FakeEngine(rule=say([111, 107, 257])), api_key="k")
    conversation = Conversation(ChatConfig(url=server.url + "/v1", api_key="wrong"))
    with pytest.raises(ChatError, match="401"):
        list(conversation.say("hello"))
    assert conversation.messages == []
    lines = iter(["x" * 2000, "hello"])
    out = io.StringIO()

    def read_line(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat(ChatConfig(url=server.url, api_key="k"), read_line=read_line, out=out)
    assert "[400: " in out.getvalue() and "1000 maximum" in out.getvalue() and "ok\n" in out.getvalue()


def test_an_answer_broken_off_ends_the_request(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    conversation = Conversation(ChatConfig(url=server.url))
    server.engine.step(2)
    answer = conversation.say("hi")
    while next(answer) == "":
        pass
    answer.close()  # type: ignore[attr-defined]
    server.engine.wait_for_aborts(1)
    server.assert_nothing_is_left()
    assert conversation.messages[-1] == {"role": "assistant", "content": "<"}


def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ChatError, match="no response from"):
        list(Conversation(ChatConfig(url="http://127.0.0.1:9")).say("hi"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", ""])
def test_an_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^url="):
        ChatConfig(url=url)
