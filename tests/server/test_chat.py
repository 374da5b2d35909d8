"""/v1/chat/completions, and OpenAI's own client against both routes."""

from __future__ import annotations

import json

import openai
import pytest
from fake_engine import FakeEngine, say
from running_server import Running, StartServer

from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
HI_PROMPT = "<|user|>hi\n<|assistant|>"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)


def prompt_of(server: Running) -> str:
    return bytes(server.engine.submitted[-1].prompt.tolist()).decode()


def test_messages_go_through_the_checkpoints_template(server: Running) -> None:
    body = server.post(PATH, {"messages": HI, "max_tokens": 3}).json()
    assert prompt_of(server) == HI_PROMPT
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0, "message": {"role": "assistant", "content": "<|u", "refusal": None}, "logprobs": None,
            "finish_reason": "length", "stop_reason": None,
        }
    ]
    assert body["usage"]["prompt_tokens"] == len(HI_PROMPT)


def test_content_may_come_in_parts(server: Running) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    server.post(PATH, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert prompt_of(server) == "<|user|>one\ntwo\n<|assistant|>"


def test_a_final_message_can_be_continued(server: Running) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well"}]
    server.post(PATH, {"messages": messages, "continue_final_message": True, "max_tokens": 1})
    assert prompt_of(server) == "<|user|>hi\n<|assistant|>Well"


def test_a_chat_gets_what_fits_unless_said_otherwise(server: Running) -> None:
    assert server.post(PATH, {"messages": HI}).json()["usage"]["total_tokens"] == 1000
    for body in ({"max_completion_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}, {"max_tokens": 7}):
        assert server.post(PATH, {"messages": HI, **body}).json()["usage"]["completion_tokens"] == 7


def test_without_a_template_the_plain_one_is_used_and_bos_is_added(
    start_server: StartServer, tokenizer: Tokenizer
) -> None:
    plain = Tokenizer(tokenizer._backend, TokenizerConfig(bos_token="<s>", add_bos_token=True))
    server = start_server(FakeEngine(rule=say([33])), plain)
    assert server.post(PATH, {"messages": HI, "max_tokens": 1}).status_code == 200
    prompt = server.engine.submitted[0].prompt.tolist()
    assert prompt[0] == 256
    assert bytes(prompt[1:]).decode() == "user: hi\nassistant:"


def test_a_stream_opens_with_the_role_and_then_has_one_event_per_token(server: Running) -> None:
    events = server.events(PATH, {"messages": HI, "max_tokens": 2, "stream_options": {"include_usage": True}})
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""}, {"content": "<"}, {"content": "|"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2


def test_logprobs_have_bytes_and_as_many_alternatives_as_asked_for(server: Running) -> None:
    body = {"messages": HI, "max_tokens": 1, "logprobs": True}
    alone = server.post(PATH, body).json()["choices"][0]["logprobs"]["content"]
    assert alone == [{"token": "<", "logprob": -1 / 3, "bytes": [60], "top_logprobs": []}]
    with_two = server.post(PATH, {**body, "top_logprobs": 2}).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in with_two[0]["top_logprobs"]] == ["<", ";"]


def test_openais_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").id == "fake-model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openais_client_completes_texts_and_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake-model", prompt="abc", max_tokens=4, logprobs=2, n=2)
    assert [choice.text for choice in answer.choices] == ["abca", "abca"]
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens == list("abca")
    extra = {"ignore_eos": True, "min_tokens": 2}
    answer = client.completions.create(model="fake-model", prompt=[[97]], max_tokens=2, extra_body=extra)
    assert answer.choices[0].text == "aa"
    stream = client.completions.create(model="fake-model", prompt="abc", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abca"


def test_openais_client_chats_and_streams_with_usage(client: openai.OpenAI) -> None:
    chat = client.chat.completions
    answer = chat.create(model="fake-model", messages=HI, max_tokens=5, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == "<|use"
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    with chat.stream(
        model="fake-model", messages=HI, stop="e", stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "<|us"
    assert final.usage is not None and final.usage.completion_tokens == 5


def test_openais_client_understands_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="fake-model", messages=HI, temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert missing.value.code == "model_not_found"


def test_a_stream_that_fails_half_way_tells_openais_client(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    server.engine.step(2)
    with pytest.raises(openai.APIError, match="rank 0 died"):
        for number, _ in enumerate(client.chat.completions.create(model="fake-model", messages=HI, stream=True)):
            if number == 2:
                server.engine.fail("rank 0 died")
    server.assert_nothing_is_left()


def test_an_effort_that_the_template_refuses_is_left_out_and_named(
    start_server: StartServer, tokenizer: Tokenizer
) -> None:
    source = ("{% if reasoning_effort not in (undefined, 'high') %}{{ raise_exception('none or high') }}{% endif %}"
              "{{ reasoning_effort }}|{% for m in messages %}{{ m.content }}{% endfor %}")  # fmt: skip
    server = start_server(tokenizer=Tokenizer(tokenizer._backend, TokenizerConfig(chat_template=source)))
    message = {"role": "user", "content": "hi"}
    for path, fields in (
        ("/v1/chat/completions", {"messages": [message], "reasoning_effort": "medium"}),
        ("/v1/responses", {"input": [message], "reasoning": {"effort": "medium"}}),
        ("/v1/messages", {"messages": [message], "output_config": {"effort": "medium"}, "model": "fake-model"}),
    ):
        answer = server.post(path, {**fields, "max_tokens": 1})
        assert (answer.status_code, answer.headers.get("x-medha-ignored")) == (200, "reasoning_effort"), answer.text
        assert bytes(server.engine.submitted[-1].prompt.tolist()) == b"|hi"
    body = {"messages": [message], "reasoning_effort": "high", "max_tokens": 1}
    assert "x-medha-ignored" not in server.post("/v1/chat/completions", body).headers
    body = {"messages": [message], "reasoning_effort": "medium"}
    assert server.post("/tokenize", body).json()["count"] == len("|hi")


def test_what_a_template_may_want_to_know_reaches_it(start_server: StartServer, tokenizer: Tokenizer) -> None:
    source = "{{ reasoning_effort }}|{{ documents[0].text }}|{{ style }}|{{ messages[0].content }}"
    server = start_server(tokenizer=Tokenizer(tokenizer._backend, TokenizerConfig(chat_template=source)))
    body = {
        "messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "low", "documents": [{"text": "d"}],
        "chat_template_kwargs": {"style": "s"}, "max_tokens": 1,
        # Options that there is nothing for here, in the form that asks for nothing.
        "use_beam_search": False, "length_penalty": 1.0, "bad_words": [], "echo": False, "modalities": ["text"],
    }  # fmt: skip
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert bytes(server.engine.submitted[-1].prompt.tolist()).decode() == "low|d|s|hi"
    counted = server.post("/tokenize", {name: body[name] for name in list(body)[:4]}).json()["count"]
    assert counted == len("low|d|s|hi")
