"""`LLM`: what generate, chat and stream return, and how one request's fault is reported."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from megatron_medha import LLM, EngineError, RequestError, RequestOutput, SamplingParams
from megatron_medha.core.errors import ConfigError

FIVE = SamplingParams(max_tokens=5, ignore_eos=True)


def test_outputs_come_in_the_order_of_their_prompts_with_the_names_that_vllm_s_users_know(llm: LLM) -> None:
    outputs = llm.generate(["hello", "hello world", [1, 2, 2]], FIVE, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["hello", "hello world", None]
    assert [output.prompt_token_ids for output in outputs] == [[1], [1, 2], [1, 2, 2]]
    assert len({output.request_id for output in outputs}) == 3
    for output in outputs:
        (completion,) = output.outputs
        assert output.finished and completion.index == 0 and completion.finished
        assert len(completion.token_ids) == 5
        assert completion.finish_reason == "length" and completion.stop_reason is None
        assert completion.logprobs is None and completion.cumulative_logprob is None
        metrics = output.metrics
        assert metrics is not None and metrics.first_token_time is not None and metrics.finished_time is not None
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_one_prompt_is_text_or_ids_or_a_mapping(llm: LLM) -> None:
    as_mappings = ({"prompt": "hello world"}, {"prompt_token_ids": [1, 2], "cache_salt": "a"})
    for prompt in ("hello world", [1, 2], *as_mappings):
        assert llm.generate(prompt, FIVE, use_tqdm=False)[0].prompt_token_ids == [1, 2]


def test_every_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in (1, 3)]
    outputs = llm.generate(["hello", "hello"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 3]
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["hello"], params)


def test_n_completions_of_a_prompt_are_numbered(llm: LLM) -> None:
    (output,) = llm.generate("hello", SamplingParams(n=3, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert all(len(one.token_ids) == 2 for one in output.outputs)


def test_a_stream_brings_what_is_new_and_adds_up_to_the_whole(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=3)
    deltas = [*llm.stream("hello world", params)]
    (whole,) = llm.generate("hello world", params, use_tqdm=False)
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert sum((delta.token_ids for delta in deltas), []) == whole.outputs[0].token_ids


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=100_000, ignore_eos=True))
    next(stream)
    stream.close()
    # Requests that were left behind would hold their places.
    (output,) = llm.generate("hello", FIVE, use_tqdm=False)
    assert output.finished
    assert llm._local.service.metrics.num_cut_off["cancelled"] == 1


def test_a_chat_is_rendered_by_the_model_s_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    one = llm.chat(messages, FIVE, use_tqdm=False)
    several = llm.chat([messages, messages], FIVE, use_tqdm=False)
    assert len(one) == 1 and len(several) == 2
    assert one[0].prompt is not None and "hello" in one[0].prompt
    assert one[0].prompt_token_ids == several[1].prompt_token_ids
    assert len([*llm.stream(messages, FIVE)]) == 5


def test_a_failed_request_leaves_the_others_alone_and_is_raised_at_the_end(llm: LLM) -> None:
    prompts = ["hello", [1, 10**9], "world"]
    with pytest.raises(ValueError, match="outside the vocabulary") as caught:
        llm.generate(prompts, FIVE, use_tqdm=False)
    assert isinstance(caught.value, RequestError) and caught.value.param == "prompt"
    for outputs in (caught.value.outputs, llm.generate(prompts, FIVE, use_tqdm=False, on_error="return")):
        assert [len(output.outputs) for output in outputs] == [1, 0, 1]
        assert [output.error is None for output in outputs] == [True, False, True]


def test_a_prompt_beyond_the_context_is_refused_as_over_http(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt is too long") as caught:
        llm.generate("hello " * 200_000, FIVE, use_tqdm=False)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"n": 0}, "n: expected"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"ttft_slo_s": 0.0}, "ttft_slo_s=0.0"),
        ({"bad_words": ["a"]}, "logit_bias forbids single tokens"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json"),
    ],
)
def test_parameters_that_nothing_could_obey_are_refused_where_they_are_made(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**fields)


def test_a_field_that_does_not_exist_is_an_error(llm: LLM) -> None:
    with pytest.raises(TypeError, match="best_off"):
        SamplingParams(best_off=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="tool"):
        llm.chat([{"role": "user", "content": "hello"}], FIVE, tool=[])
    with pytest.raises(RequestError, match="`text` is none of its keys"):
        llm.generate({"text": "hello"}, FIVE)
    with pytest.raises(RequestError, match=r"prompts\[1\]: expected text"):
        llm.generate(["hello", 2.5], FIVE)  # type: ignore[list-item]
    with pytest.raises(RequestError, match="slo_class=urgent"):
        llm.generate("hello", SamplingParams(slo_class="urgent"), use_tqdm=False)


def test_more_requests_than_the_limits_allow_wait_for_a_place(make: Callable[..., LLM]) -> None:
    llm = make(**{"server.max_live_requests": 4, "server.max_waiting_requests": 3})
    outputs: list[RequestOutput] = []
    others = threading.Thread(target=lambda: outputs.extend(llm.generate(["world"] * 20, FIVE, use_tqdm=False)))
    others.start()
    outputs += llm.generate(["hello"] * 20, FIVE, use_tqdm=False)
    others.join()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5] * 40
    with pytest.raises(RequestError, match="max_live_requests"):
        llm.generate("hello", SamplingParams(n=8, max_tokens=1), use_tqdm=False)


def test_options_are_those_of_the_command_line(make: Callable[..., LLM]) -> None:
    llm = make(scheduler="fcfs", parallel={"tp": 2}, **{"scheduler.step_budget_s": 0.03}, max_num_seqs=7)
    config = llm._local.service.engine._scheduler.config  # type: ignore[attr-defined]
    assert (config.policy, config.step_budget_s, config.max_num_sequences) == ("fcfs", 0.03, 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler.polcy": "fcfs"}, "did you mean scheduler.policy"),
        ({"tensor_paralel_size": 2}, "tensor_paralel_size"),
        ({"server.port": 8000}, "nothing listens"),
        ({"parallel": {"tp": 3}}, "parallel.tp=3"),
    ],
)
def test_wrong_options_are_named(simulated: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(**{**simulated, **options})


def test_a_directory_that_is_no_checkpoint_is_named() -> None:
    with pytest.raises(ConfigError, match="checkpoint=/nowhere: no such directory"):
        LLM("/nowhere")
    with pytest.raises(ConfigError, match="checkpoint=/nowhere"):
        LLM(model="/nowhere")


def test_a_closed_llm_says_so_and_fails_what_still_runs(make: Callable[..., LLM]) -> None:
    llm = make()
    stream = llm.stream("hello", SamplingParams(max_tokens=100_000, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineError):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        llm.generate("hello")
