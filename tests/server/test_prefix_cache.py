"""What requests say of the prefix cache: whose prompts share KV, and which keys the engine gets."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from live_server import LiveEngine
from prometheus_client.parser import text_string_to_metric_families
from running_server import Running, StartServer, eventually

from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.core.request import Request
from megatron_medha.server.routes.generate import IGNORED_HEADER
from megatron_medha.text.tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"
PROMPT = "All that is said here is said again in the next turn."  # 53 bytes, each a token


def requests_of(server: Running) -> list[Request]:
    return [live.request for live in server.engine.submitted]


def keys_after(server: Running, headers: dict[str, str] | None = None, **body: object) -> bytes:
    response = server.post(COMPLETIONS, {"max_tokens": 1, "prompt": PROMPT, **body}, headers=headers)
    assert response.status_code == 200, response.text
    return requests_of(server)[-1].prefix_keys


def test_a_prompt_has_a_key_for_each_full_granule_and_shares_those_of_its_prefixes(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    keys = keys_after(server)
    assert len(keys) == 3 * KEY_BYTES
    assert keys_after(server, prompt=PROMPT[:40]) == keys[: 2 * KEY_BYTES]
    assert keys_after(server, prompt=list(PROMPT.encode())) == keys
    assert keys_after(server, prompt=PROMPT[:15]) == b""
    assert keys_after(server, prompt="x" + PROMPT[1:])[:KEY_BYTES] != keys[:KEY_BYTES]


def test_outputs_continue_the_keys_of_their_prompt_each_choice_its_own(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    keys_after(server, n=2)
    first, second = (live.keys for live in server.engine.submitted)
    assert first is not None and second is not None
    more = "0123456789ab"
    whole = keys_after(server, prompt=PROMPT + more)
    assert len(whole) == 4 * KEY_BYTES
    assert requests_of(server)[0].prefix_keys + b"".join(first.append(ord(char)) for char in more) == whole
    assert b"".join(second.append(0) for _ in more) != whole[3 * KEY_BYTES :]


def test_prompts_that_come_more_than_once_in_a_call_are_encoded_once(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    keys_after(server, prompt=[PROMPT, "another", PROMPT], n=2)
    first, *others = [live.prompt for live in server.engine.submitted]
    assert [prompt is first for prompt in others] == [True, False, False, True, True]
    assert len({request.prefix_keys for request in requests_of(server)}) == 2


def test_without_a_prefix_cache_there_are_no_keys(start_server: StartServer) -> None:
    server = start_server(FakeEngine())
    assert keys_after(server) == b""
    assert server.engine.submitted[0].keys is None


def test_who_asks_for_log_probabilities_of_the_prompt_has_all_of_it_computed(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    keys = [keys_after(server, **fields) for fields in ({}, {"logprobs": 1}, {"echo": True, "logprobs": 1})]
    assert [request.reads_cache for request in requests_of(server)] == [True, True, False]
    assert len(set(keys)) == 1  # its KV is of use to others


def test_requests_of_two_keys_share_nothing_where_keys_are_isolated(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice secret-a\nbob secret-b\n")
    path.chmod(0o600)
    alice, bob = ({"authorization": f"Bearer secret-{name}"} for name in "ab")
    for isolates_keys in (False, True):
        server = start_server(
            FakeEngine(granule_tokens=16), api_key_file=path, isolates_keys=isolates_keys
        )
        keys = [keys_after(server, headers=headers) for headers in (alice, bob, alice)]
        assert keys[0] == keys[2]
        assert (keys[0] != keys[1]) == isolates_keys


def test_keys_of_two_servers_differ(start_server: StartServer) -> None:
    first, second = (start_server(FakeEngine(granule_tokens=16)) for _ in range(2))
    assert keys_after(first) != keys_after(second)


def test_the_turns_of_a_chat_continue_the_ids_and_the_keys_of_those_before(
    start_server: StartServer, tokenizer: Tokenizer
) -> None:
    server = start_server(FakeEngine(granule_tokens=16, max_request_tokens=20_000))
    messages = [{"role": "system", "content": "<s>" + "Be of help. " * 100 + "</s>"}]
    for turn in range(4):
        messages.append({"role": "user", "content": f"question {turn} " * 30})
        assert server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).status_code == 200
        messages.append({"role": "assistant", "content": f"answer {turn}</s>"})
    prompts = [live.prompt for live in server.engine.submitted]
    assert [tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False)) for ids in prompts] == prompts
    keys = [request.prefix_keys for request in requests_of(server)]
    assert [len(one) // KEY_BYTES for one in keys] == [len(ids) // 16 for ids in prompts]
    for before, after in pairwise(keys):
        assert before and after.startswith(before[: -2 * KEY_BYTES])  # up to "<|assistant|>"


CHATS = {"/v1/chat/completions": "messages", "/v1/messages": "messages", "/v1/responses": "input"}


def asked(server: Running, path: str = COMPLETIONS, headers: dict[str, str] | None = None, **fields: object) -> Any:
    """The response to a prompt of 40 tokens or more, as JSON."""
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {CHATS[path]: [{"role": "user", "content": PROMPT}]}
    length = {} if path == "/v1/responses" else {"max_tokens": 2}
    response = server.post(path, {**prompt, **length, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("path", [COMPLETIONS, *CHATS])
def test_a_salt_and_a_session_come_with_any_route(start_server: StartServer, path: str) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}, {"cache_prompt": True}):
        asked(server, path, **fields)
    keys = [request.prefix_keys for request in requests_of(server)]
    assert keys[0] == keys[4] and keys[1] == keys[3] and len({*keys}) == 3 and all(keys)
    asked(server, path, cache_prompt=False)
    assert (requests_of(server)[-1].prefix_keys, server.engine.submitted[-1].keys) == (b"", None)
    asked(server, path, session_id="s", ends_session=True)
    assert (requests_of(server)[-1].session_id, requests_of(server)[-1].ends_session) == ("anonymous s", True)


@pytest.mark.parametrize(
    ("fields", "header", "session"),
    [
        ({}, None, ""), ({}, "h", "h"), ({"session_id": "b"}, None, "b"), ({"prompt_cache_key": "k"}, None, "k"),
        ({"session_id": "b", "prompt_cache_key": "k"}, "h", "b"), ({"prompt_cache_key": "k"}, "h", "h"),
        ({"prompt_cache_key": ""}, None, ""), ({"ends_session": True}, None, ""),
    ],
)  # fmt: skip
def test_a_session_has_the_most_exact_of_its_names(
    start_server: StartServer, fields: dict[str, object], header: str | None, session: str
) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    asked(server, headers={} if header is None else {"x-session-id": header}, **fields)
    request = requests_of(server)[0]
    assert request.session_id == (f"anonymous {session}" if session else "")
    assert not request.ends_session


def test_the_end_of_no_session_is_named_as_ignored(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16))
    body: dict[str, Any] = {"max_tokens": 1, "prompt": PROMPT, "ends_session": True}
    assert server.post(COMPLETIONS, body).headers[IGNORED_HEADER] == "ends_session"
    assert IGNORED_HEADER not in server.post(COMPLETIONS, {**body, "session_id": "s"}).headers


def test_two_keys_cannot_name_one_session(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a secret-1\nab secret-2\n")
    path.chmod(0o600)
    server = start_server(FakeEngine(granule_tokens=16), api_key_file=path)
    for key, session in (("secret-1", "b s"), ("secret-2", "s"), ("secret-1", "s")):
        asked(server, headers={"authorization": f"Bearer {key}"}, session_id=session)
    assert len({request.session_id for request in requests_of(server)}) == 3


@pytest.mark.parametrize(
    "fields", [{"session_id": ""}, {"session_id": "x" * 257}, {"cache_salt": ""}, {"cache_salt": 1}, {"nvext": 1}]
)
def test_a_name_that_is_none_is_refused_by_the_field(start_server: StartServer, fields: dict[str, object]) -> None:
    server = start_server()
    response = server.post(COMPLETIONS, {"prompt": "a", **fields})
    assert response.status_code == 400 and next(iter(fields)) in response.text
    response = server.post(COMPLETIONS, {"prompt": "a"}, headers={"x-session-id": "x" * 257})
    assert response.status_code == 400 and "x-session-id" in response.text


@pytest.mark.parametrize(
    ("fields", "priority", "ignored"),
    [
        ({"nvext": {"agent_hints": {"priority": 5}}}, -5, None),
        ({"nvext": {"agent_hints": {"priority": 5}}, "priority": 2}, 2, None),
        ({"nvext": {"agent_hints": {"osl": 100, "speculative_prefill": True}}}, 0,
         "nvext.agent_hints.osl, nvext.agent_hints.speculative_prefill"),
        ({"nvext": {"annotations": ["a"]}}, 0, None), ({"nvext": None}, 0, None),
    ],
)  # fmt: skip
def test_hints_of_agents_set_the_priority_and_what_is_left_out_is_named(
    start_server: StartServer, fields: dict[str, object], priority: int, ignored: str | None
) -> None:
    server = start_server()
    response = asked(server, **fields)
    assert requests_of(server)[0].priority == priority
    assert response.headers.get(IGNORED_HEADER) == ignored


def test_usage_says_how_much_of_the_prompt_was_cached_on_every_route(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16, num_cached=lambda request: 32))
    for path in (COMPLETIONS, "/v1/chat/completions"):
        assert asked(server, path).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    usage = asked(server, "/v1/responses", max_output_tokens=1).json()["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": 32}
    usage = asked(server, "/v1/messages").json()["usage"]
    num_prompt_tokens = requests_of(server)[-1].num_prompt_tokens
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (num_prompt_tokens - 32, 32)


def test_usage_in_streams_says_it_too(start_server: StartServer) -> None:
    server = start_server(FakeEngine(granule_tokens=16, num_cached=lambda request: 32))
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3, "stream_options": options})
    assert {json.loads(event)["usage"]["prompt_tokens_details"]["cached_tokens"] for event in events[:-1]} == {32}
    messages = [{"role": "user", "content": PROMPT}]
    events = server.events("/v1/messages", {"messages": messages, "max_tokens": 3})
    delta = next(one for one in map(json.loads, events) if one["type"] == "message_delta")
    assert delta["usage"]["cache_read_input_tokens"] == 32


def test_of_several_choices_the_least_counts_once_for_their_prompt(start_server: StartServer) -> None:
    # The second choice finds what the first has computed.
    server = start_server(FakeEngine(granule_tokens=16, num_cached=lambda request: 16 * int(request.request_id[-1])))
    usage = asked(server, n=3).json()["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (len(PROMPT), 0)
    usage = asked(server, prompt=[PROMPT, PROMPT], n=2).json()["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (2 * len(PROMPT), 32)


def metrics_of(server: Running) -> dict[str, float]:
    """By name, over all labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def test_the_tokens_that_are_looked_for_are_counted(start_server: StartServer) -> None:
    engine = LiveEngine(kv=KVConfig())
    server = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics)
    eventually(lambda: server.get("/ready").status_code == 200)
    prompt = list(range(200))
    for fields in ({}, {"cache_prompt": False}, {"echo": True, "logprobs": 0}):
        asked(server, prompt=prompt, **fields)
    values = metrics_of(server)
    assert values["vllm:prefix_cache_queries_total"] == values["medha:prefix_cache_queries_total"] == len(prompt)
    assert values["vllm:prefix_cache_hits_total"] == values["medha:cached_prompt_tokens_total"] == 0
    assert values["medha:prefix_cache_saved_seconds_total"] == 0
