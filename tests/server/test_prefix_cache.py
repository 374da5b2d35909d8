"""What requests say of the prefix cache: whose prompts share KV, and which keys the engine gets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from fake_engine import FakeEngine
from running_server import Running, StartServer

from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.core.request import Request
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
