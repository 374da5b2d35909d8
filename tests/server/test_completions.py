"""/v1/completions: what clients get."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest
from fake_engine import FakeEngine, say
from running_server import Running, StartServer

from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.server.bodies.openai_types import CompletionLogprobs
from megatron_medha.server.openai import wire_format
from megatron_medha.server.openai.openai_logprobs import add_completion_token

PATH = "/v1/completions"


def choices_of(server: Running, **body: object) -> list[dict]:
    response = server.post(PATH, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def stream_of(server: Running, **body: object) -> list[dict]:
    events = server.events(PATH, body)
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_text_is_continued_by_sixteen_tokens_unless_said_otherwise(server: Running) -> None:
    body = server.post(PATH, {"model": "fake-model", "prompt": "abc"}).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "abcabcabcabcabca", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19, "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["ab"]),
        (["abc", "xyz"], ["ab", "xy"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [120, 121, 122]], ["ab", "xy"]),
    ],
)
def test_prompts_come_as_text_or_ids_alone_or_in_lists(server: Running, prompt: object, texts: list[str]) -> None:
    choices = choices_of(server, prompt=prompt, max_tokens=2)
    assert [choice["text"] for choice in choices] == texts
    assert [choice["index"] for choice in choices] == list(range(len(texts)))
    server.assert_nothing_is_left()


def test_n_gives_that_many_choices_each_with_its_own_seed(server: Running) -> None:
    body = server.post(PATH, {"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "seed": 7}).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "a", "b", "b"]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 4
    assert [live.sampling.seed for live in server.engine.submitted] == [7, 8, 9, 10]


def test_the_choices_of_a_request_share_one_prompt(server: Running) -> None:
    choices_of(server, prompt="abc", n=3, echo=True)
    first, *others = (live.prompt for live in server.engine.submitted)
    assert len(others) == 2 and all(one is first for one in others)


def test_every_request_without_a_seed_gets_one(server: Running) -> None:
    choices_of(server, prompt="a")
    choices_of(server, prompt="a", seed=None)
    seeds = [live.sampling.seed for live in server.engine.submitted]
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] != seeds[1]


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    choices_of(
        server, prompt="abc", max_tokens=9, min_tokens=2, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, seed=-1,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=-0.3, logit_bias={"5": 1.5},
        stop_token_ids=[9], priority=-4,
    )
    live = server.engine.submitted[0]
    assert live.request.priority == -4
    assert live.request.max_output_tokens == live.sampling.max_output_tokens == 9
    sampling = live.sampling
    assert (sampling.min_output_tokens, sampling.temperature, sampling.top_k) == (2, 0.5, 5)
    assert (sampling.top_p, sampling.min_p, sampling.seed) == (0.9, 0.1, 2**63 - 1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.2, -0.3)
    assert sampling.logit_bias == ((5, 1.5),)
    assert sampling.stop_token_ids == (257, 9)


def test_fields_that_are_null_or_unknown_are_as_if_absent(server: Running) -> None:
    names = ("stop", "logprobs", "seed", "temperature", "top_p", "top_k", "n", "max_tokens", "stream", "user", "echo")
    choices = choices_of(server, prompt="abc", **dict.fromkeys(names), some_future_field={"a": [1]})
    assert len(choices[0]["text"]) == 16


def test_latency_targets_come_in_headers(server: Running) -> None:
    server.post(PATH, {"prompt": "a"}, headers={"x-slo-ttft-ms": "1500", "x-slo-tpot-ms": "2.5"})
    request = server.engine.submitted[0].request
    assert (request.ttft_slo_s, request.tpot_slo_s) == (1.5, 0.0025)


def test_a_service_tier_is_a_priority_unless_one_is_given(server: Running) -> None:
    for body in ({"service_tier": "flex"}, {"service_tier": "priority"}, {"service_tier": "flex", "priority": -9}):
        choices_of(server, prompt="a", **body)
    assert [live.request.priority for live in server.engine.submitted] == [1, -1, -9]


def test_each_token_is_one_event_and_the_last_one_says_why_it_ended(server: Running) -> None:
    events = stream_of(server, prompt="abc", max_tokens=4)
    assert [event["choices"][0]["text"] for event in events] == ["a", "b", "c", "a"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert "usage" not in events[0]


def test_a_token_without_text_still_has_its_event(server: Running) -> None:
    events = stream_of(server, prompt="é", max_tokens=4)
    assert [event["choices"][0]["text"] for event in events] == ["", "é", "", "é"]


def test_usage_comes_last_in_an_event_without_choices(server: Running) -> None:
    events = stream_of(server, prompt="abc", max_tokens=2, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None, None]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 2


def test_usage_comes_with_every_event_when_asked_for(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream_of(server, prompt="abc", max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_events_of_several_choices_carry_their_index(server: Running) -> None:
    events = stream_of(server, prompt=["ab", "xy"], n=2, max_tokens=2)
    texts = ["", "", "", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["ab", "ab", "xy", "xy"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("is_included", "text"), [(False, "ab"), (True, "abcd")])
def test_a_stop_string_across_tokens_ends_the_request_in_the_engine(
    start_server: StartServer, is_stream: bool, is_included: bool, text: str
) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    server.engine.step(5)  # one more than needed, which must not be waited for
    body = {
        "prompt": "abcdef", "max_tokens": 900, "stop": ["zz", "cd"], "include_stop_str_in_output": is_included,
    }
    if is_stream:
        events = stream_of(server, **body)
        assert len(events) == 4
        choices = [event["choices"][0] for event in events]
    else:
        choices = choices_of(server, **body)
    assert "".join(choice["text"] for choice in choices) == text
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "cd")
    server.engine.wait_for_aborts(1)
    server.assert_nothing_is_left()


def test_a_stop_string_counts_only_after_min_tokens(server: Running) -> None:
    choice = choices_of(server, prompt="ab", max_tokens=9, min_tokens=5, stop="b")[0]
    assert (choice["text"], choice["finish_reason"]) == ("ababa", "stop")


def test_text_held_back_for_a_stop_string_comes_with_the_last_token(server: Running) -> None:
    events = stream_of(server, prompt="ab", max_tokens=3, stop="bax")
    assert [event["choices"][0]["text"] for event in events] == ["a", "", "ba"]


def test_the_models_end_token_ends_the_text_without_being_part_of_it(start_server: StartServer) -> None:
    server = start_server(FakeEngine(rule=say([104, 105, 257])))
    body = server.post(PATH, {"prompt": "x", "max_tokens": 9, "skip_special_tokens": False}).json()
    assert body["choices"][0]["text"] == "hi"
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", None)
    assert body["usage"]["completion_tokens"] == 3


def test_ignore_eos_yields_exactly_max_tokens(start_server: StartServer) -> None:
    server = start_server(FakeEngine(rule=say([104, 105, 257])))
    body = server.post(PATH, {"prompt": "x", "max_tokens": 9, "ignore_eos": True}).json()
    assert body["usage"]["completion_tokens"] == 9
    assert body["choices"][0]["text"] == "hihihi"


def test_a_clients_own_stop_token_is_named(start_server: StartServer) -> None:
    server = start_server(FakeEngine(rule=say([104, 105, 106])))
    choice = choices_of(server, prompt="x", stop_token_ids=[106], ignore_eos=True)[0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hi", "stop", 106)


def test_echo_repeats_the_prompt(server: Running) -> None:
    assert choices_of(server, prompt="abc", echo=True, max_tokens=2)[0]["text"] == "abcab"
    assert choices_of(server, prompt=[97, 98], echo=True, max_tokens=1)[0]["text"] == "aba"
    events = stream_of(server, prompt="abc", echo=True, max_tokens=2)
    assert [event["choices"][0]["text"] for event in events] == ["abca", "b"]


def test_logprobs_name_the_chosen_token_among_the_best(server: Running) -> None:
    logprobs = choices_of(server, prompt="de", max_tokens=2, logprobs=1)[0]["logprobs"]
    assert logprobs == {
        "tokens": ["d", "e"],
        "token_logprobs": [-1 / 3, -2 / 3],
        "top_logprobs": [{"d": -1 / 3}, {"e": -2 / 3, "d": -1 / 3}],
        "text_offset": [0, 1],
    }


def test_tokens_with_the_same_text_keep_their_logprobs_apart() -> None:
    lists = CompletionLogprobs([], [], [], [])
    chosen = TokenLogprobs(5, -2.0, 2, ((6, -1.0), (5, -2.0), (7, float("-inf"))))
    add_completion_token(lists, 5, chosen, 0, lambda token_id: "same")
    assert lists.top_logprobs == [{"same": -2.0, "token_id:6": -1.0, "token_id:7": -9999.0}]


def test_echoed_logprobs_cover_the_whole_prompt_for_evaluation(server: Running) -> None:
    choice = choices_of(server, prompt=[100, 100, 101], echo=True, logprobs=1, max_tokens=1)[0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["d", "d", "e", "d"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    is_best = [
        value == max(top.values())
        for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
    ]
    assert is_best == [True, False, True]
    assert logprobs["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize("is_stream", [False, True])
def test_max_tokens_zero_gives_the_prompt_alone(server: Running, is_stream: bool) -> None:
    body = {"prompt": "de", "echo": True, "logprobs": 0, "max_tokens": 0}
    choices = (
        [event["choices"][0] for event in stream_of(server, **body)] if is_stream else choices_of(server, **body)
    )
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("de", "length")]
    assert choices[0]["logprobs"]["tokens"] == ["d", "e"]
    if not is_stream:
        assert server.post(PATH, body).json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "status"),
    [(1000, 0, 200), (999, 0, 200), (1001, 0, 400), (999, 1, 200), (1000, 1, 400), (1000, None, 400), (990, 10, 200)],
)
@pytest.mark.parametrize("is_text", [False, True])
def test_a_prompt_may_fill_the_whole_context_where_nothing_is_generated(
    server: Running, num_tokens: int, max_tokens: int | None, status: int, is_text: bool
) -> None:
    prompt = "d" * num_tokens if is_text else [100] * num_tokens
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    answer = server.post(PATH, body)
    assert answer.status_code == status, answer.text
    if status == 200:
        scores = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert len(scores) == num_tokens + (max_tokens or 0) and None not in scores[1:]


def test_logprobs_come_with_each_event_of_a_stream(server: Running) -> None:
    events = stream_of(server, prompt="dé", max_tokens=3, logprobs=0)
    logprobs = [event["choices"][0]["logprobs"] for event in events]
    assert [entry["tokens"] for entry in logprobs] == [["d"], ["bytes:\\xc3"], ["bytes:\\xa9"]]
    assert [entry["text_offset"] for entry in logprobs] == [[0], [1], [1]]


def test_tokens_can_be_named_by_id_and_returned(server: Running) -> None:
    body = {"prompt": "de", "max_tokens": 2, "logprobs": 0}
    choice = choices_of(server, **body, return_token_ids=True, return_tokens_as_token_ids=True)[0]
    assert choice["token_ids"] == [100, 101]
    assert choice["prompt_token_ids"] == [100, 101]
    assert choice["logprobs"]["tokens"] == ["token_id:100", "token_id:101"]


def test_a_prompt_up_to_the_limit_is_taken_and_gets_what_fits(server: Running) -> None:
    body = server.post(PATH, {"prompt": [97] * 995}).json()
    assert body["usage"]["completion_tokens"] == 5
    assert server.post(PATH, {"prompt": [97] * 999, "max_tokens": 1}).status_code == 200


def test_long_text_is_encoded_beside_the_event_loop(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_request_tokens=100_000))
    body = server.post(PATH, {"prompt": "abcd" * 20_000, "max_tokens": 1}).json()
    assert body["usage"]["prompt_tokens"] == 80_000


def test_the_first_served_name_signs_answers_and_all_are_listed(start_server: StartServer) -> None:
    server = start_server(served_model_names=("org/one", "two"))
    assert server.post(PATH, {"prompt": "a"}).json()["model"] == "org/one"
    assert server.post(PATH, {"prompt": "a", "model": "two"}).json()["model"] == "two"
    assert server.post(PATH, {"prompt": "a", "model": "fake-model"}).status_code == 404


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_long_prompt_in_an_answer_is_written_on_a_thread_by_slices(
    start_server: StartServer, is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_encoded: list[int] = []
    threads: set[str] = set()
    encode = wire_format.encode_json

    def encode_counted(body: object) -> bytes:
        if isinstance(body, list):
            num_encoded.append(len(body))
            threads.add(threading.current_thread().name)
        return encode(body)

    monkeypatch.setattr(wire_format, "encode_json", encode_counted)
    server = start_server(FakeEngine(max_request_tokens=20_000))
    prompt = [97 + place % 20 for place in range(10_000)]
    body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "return_token_ids": True}
    answer = server.post("/v1/completions", {**body, "stream": is_stream})
    first = json.loads(answer.text.removeprefix("data: ").split("\n")[0]) if is_stream else answer.json()
    choice = first["choices"][0]
    assert choice["prompt_token_ids"] == prompt and choice["text"][:10_000] == bytes(prompt).decode()
    assert [len(choice["logprobs"][name]) for name in ("tokens", "top_logprobs", "text_offset")] == [10_001] * 3
    assert choice["logprobs"]["text_offset"] == list(range(10_001))
    assert max(num_encoded) <= 2_048 and sum(num_encoded) >= 5 * 10_000
    assert threads and server.thread.name not in threads


def test_other_requests_are_served_between_the_choices_of_one(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    turns_of_submissions: list[int] = []
    turns_of_tokens: list[int] = []
    num_turns, is_done = 0, threading.Event()
    submit, first_token = server.engine.submit, server.service.metrics.first_token
    loop = server.service.streams._loop
    assert loop is not None

    def turn() -> None:
        nonlocal num_turns
        num_turns += 1
        if not is_done.is_set():
            loop.call_soon(turn)

    def noting_submit(*args: object) -> None:
        turns_of_submissions.append(num_turns)
        submit(*args)

    def noting_first_token(*args: object) -> None:
        turns_of_tokens.append(num_turns)
        first_token(*args)

    server.engine.submit = noting_submit  # type: ignore[method-assign]
    server.service.metrics.first_token = noting_first_token  # type: ignore[method-assign]
    loop.call_soon_threadsafe(turn)
    try:
        with server.connect(PATH, json.dumps({"prompt": ["a"] * 300, "max_tokens": 1}).encode()) as connection:
            server.engine.wait_for_submitted(300)
            server.engine.step(1)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    finally:
        is_done.set()
    for turns in (turns_of_submissions, turns_of_tokens):
        assert len(turns) == 300
        assert max(Counter(turns).values()) <= 64
