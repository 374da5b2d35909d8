"""Bodies of many token ids: the same as any other, but the event loop runs between their slices."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from array import array

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import StartServer

from megatron_medha.server.errors import ApiError
from megatron_medha.server.large_prompt import MIN_BYTES, SLICE_BYTES, decode_completion
from megatron_medha.server.service import LONG_TEXT_CHARS, MAX_INLINE_CHARS
from megatron_medha.server.tokens import Tokenizer

IDS = [place * 7919 % 100_000 for place in range(200_000)]


def decode(body: bytes) -> object:
    return asyncio.run(decode_completion(body)).prompt


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", ":\t")])
def test_a_long_list_of_ids_is_decoded_whole(separators: tuple[str, str]) -> None:
    assert decode(json.dumps({"prompt": IDS, "max_tokens": 1}, separators=separators).encode()) == array("i", IDS)


def test_others_run_between_the_slices() -> None:
    async def work() -> int:
        num_turns = 0

        async def count() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await decode_completion(json.dumps({"prompt": IDS}).encode())
        counting.cancel()
        return num_turns

    assert asyncio.run(work()) > 10


@pytest.mark.parametrize("prompt", ["a" * MIN_BYTES, ["a" * MIN_BYTES, "b"], [IDS, IDS[:3]], [[]] * MIN_BYTES])
def test_other_large_prompts_are_decoded_as_before(prompt: object) -> None:
    assert decode(json.dumps({"prompt": prompt}).encode()) == prompt


@pytest.mark.parametrize(
    "prompt", ["1," * SLICE_BYTES * 4 + "1.5", "1," * SLICE_BYTES * 4 + '"a",null', "1," * SLICE_BYTES * 4 + "--1"]
)
def test_what_is_wrong_in_a_large_body_is_refused(prompt: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(b'{"prompt":[' + prompt.encode() + b"]}")
    assert caught.value.status == 400


def test_large_prompts_go_through_the_server_and_wrong_ids_are_named(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_request_tokens=500_000, vocab_size=100_000))
    answer = server.post("/v1/completions", {"prompt": IDS, "max_tokens": 2, "return_token_ids": True}).json()
    assert answer["usage"]["prompt_tokens"] == len(IDS) and answer["choices"][0]["token_ids"] == IDS[:2]
    assert server.engine.submitted[0].prompt == array("i", IDS)
    for wrong in (100_000, -1, 2**31, 10**30):
        refused = server.post("/v1/completions", {"prompt": [*IDS, wrong]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


class _SlowTokenizer(Tokenizer):
    """Takes its time with long text."""

    may_go_on: threading.Event
    has_begun: threading.Semaphore

    def encode(self, text: str, *, add_special_tokens: bool = True) -> array[int]:
        if len(text) > LONG_TEXT_CHARS:
            self.has_begun.release()
            assert self.may_go_on.wait(WAIT_S)
        return super().encode(text, add_special_tokens=add_special_tokens)


def test_long_texts_keep_only_each_other_waiting(start_server: StartServer, tokenizer: Tokenizer) -> None:
    slow = _SlowTokenizer(tokenizer._backend, tokenizer.config)
    slow.may_go_on, slow.has_begun = threading.Event(), threading.Semaphore(0)
    room = 5 * LONG_TEXT_CHARS
    server = start_server(FakeEngine(max_request_tokens=10**6), slow, max_body_bytes=room, max_bodies_bytes=room)
    body = json.dumps({"prompt": "a" * (LONG_TEXT_CHARS + 1), "max_tokens": 1}).encode()
    long = [server.connect("/v1/completions", body) for _ in range(4)]
    while server.service.num_held_bytes < 4 * LONG_TEXT_CHARS:
        time.sleep(0.001)  # all four have arrived
    for _ in range(2):
        assert slow.has_begun.acquire(timeout=WAIT_S)
    answer = server.post("/v1/completions", {"prompt": "b" * (MAX_INLINE_CHARS + 1), "max_tokens": 1})
    assert answer.status_code == 200
    too_many = server.post("/v1/completions", {"prompt": "c" * (LONG_TEXT_CHARS + 1)})
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (503, "bodies_waiting")
    slow.may_go_on.set()
    for connection in long:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.close()
