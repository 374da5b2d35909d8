"""/tokenize and /detokenize of long texts: the same rule as for prompts, and nothing made at once for all tokens."""

from __future__ import annotations

import json
import random
import threading

import pytest
from fake_engine import FakeEngine
from running_server import StartServer, byte_tokenizer_backend

from megatron_medha.server.openai import wire_format
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

LIMIT = 50_000
CHAT = [{"role": "user", "content": "a" * (LIMIT + 1)}]


class _CountingTokenizer(Tokenizer):
    """Knows how many tokens it has made."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer_backend(), TokenizerConfig())
        self.num_made = 0
        encode_slices = self._encode_slices
        assert encode_slices is not None

        def counted(text: str) -> object:
            for ids in encode_slices(text):
                self.num_made += len(ids)
                yield ids

        self._encode_slices = counted


@pytest.mark.parametrize(("body", "param"), [
    ({"prompt": "a" * (LIMIT + 1)}, "prompt"), ({"prompt": "a b " * LIMIT}, "prompt"),
    ({"prompt": "a b " * 4 * LIMIT}, "prompt"), ({"messages": CHAT}, "messages"),
])  # fmt: skip
def test_a_text_beyond_the_context_is_not_tokenized_to_its_end(
    start_server: StartServer, body: dict[str, object], param: str
) -> None:
    counting = _CountingTokenizer()
    server = start_server(FakeEngine(max_request_tokens=LIMIT), counting)
    refused = server.post("/tokenize", body)
    assert refused.status_code == 400
    assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == (param, "context_length_exceeded")
    assert counting.num_made <= LIMIT + 40_000
    if param == "prompt":
        assert server.post("/v1/completions", {**body, "max_tokens": 1}).json()["error"]["param"] == param
        assert counting.num_made <= 2 * (LIMIT + 40_000)


def test_a_text_beyond_the_server_s_own_limit_is_refused_as_prompts_are(start_server: StartServer) -> None:
    server = start_server(max_prompt_tokens=100)
    refused = server.post("/tokenize", {"prompt": "a" * 101})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "prompt_too_long")
    assert server.post("/tokenize", {"prompt": "a" * 100}).json()["count"] == 100


@pytest.mark.parametrize("has_strings", [True, False, None])
def test_many_tokens_are_answered_as_few_are(start_server: StartServer, has_strings: bool | None) -> None:
    server = start_server(FakeEngine(max_request_tokens=LIMIT))
    text = "é x\n" * (LIMIT // 5)
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": has_strings}).json()
    few = server.post("/tokenize", {"prompt": text[:4], "return_token_strs": has_strings}).json()
    times = len(text) // 4
    assert list(answer) == list(few) and answer["count"] == times * few["count"]
    assert answer["tokens"] == times * few["tokens"]
    assert answer["token_strs"] == (times * few["token_strs"] if has_strings else None)


def test_more_ids_than_the_context_holds_are_not_detokenized(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_request_tokens=LIMIT))
    refused = server.post("/detokenize", {"tokens": [97] * (LIMIT + 1)})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


def test_many_ids_are_answered_with_the_text_that_the_library_gives(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_request_tokens=LIMIT))
    rng = random.Random(0)
    ids = [rng.randrange(258) for _ in range(20_000)] + [*"é漢🙂\"\\\n".encode()] * 1000
    expected = byte_tokenizer_backend().decode(ids, skip_special_tokens=False)
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": expected}
    for wrong in (-1, 300, 2**40):
        refused = server.post("/detokenize", {"tokens": [*ids, wrong]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


def test_a_long_response_is_encoded_on_a_thread_by_slices(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    threads: set[str] = set()
    encode = wire_format.encode_json

    def encode_counted(body: list[object] | str) -> bytes:
        lengths.append(len(body))
        threads.add(threading.current_thread().name)
        return encode(body)

    monkeypatch.setattr(wire_format, "encode_json", encode_counted)
    server = start_server(FakeEngine(max_request_tokens=100_000))
    answer = server.post("/tokenize", {"prompt": "a" * 100_000, "return_token_strs": True}).json()
    assert answer["tokens"] == 100_000 * [97] and answer["token_strs"] == 100_000 * ["a"]
    assert max(lengths) <= 2_048 and sum(lengths) == 200_000
    lengths.clear()
    assert server.post("/detokenize", {"tokens": 100_000 * [97]}).json() == {"prompt": "a" * 100_000}
    assert max(lengths) <= 65_536 and sum(lengths) == 100_000
    assert threads and all(name.startswith("text") for name in threads)


def test_a_refusal_does_not_repeat_megabytes(start_server: StartServer) -> None:
    server = start_server()
    long = "x" * 2**20
    for path, body in (
        ("/v1/completions", {"prompt": "a", "model": long}), ("/tokenize", {"prompt": "a", "model": long}),
        ("/v1/completions", {"prompt": "a", "guided_choice": [long]}), ("/detokenize", {"tokens": [], "model": long}),
        ("/v1/completions", {"prompt": "a", "service_tier": long}), ("/v1/responses", {"input": "a", "model": long}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {long: 1}}),
        ("/v1/chat/completions", {"messages": [{"role": long, "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tool_choice": long}),
    ):  # fmt: skip
        answer = server.client.post(path, content=json.dumps(body).encode())
        assert answer.status_code < 500 and len(answer.content) < 5_000, path
