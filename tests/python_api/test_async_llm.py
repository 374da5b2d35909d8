"""`AsyncLLM`: outputs as they grow, on the caller's loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_medha import AsyncLLM, RequestError, SamplingParams
from megatron_medha.core.errors import ConfigError

FIVE = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)


def test_outputs_grow_until_the_last_is_finished(simulated: dict[str, Any]) -> None:
    async def work() -> None:
        async with AsyncLLM(**simulated) as llm:
            outputs = [output async for output in llm.generate("hello world", FIVE, request_id="mine")]
            assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5]
            assert [output.finished for output in outputs] == [False] * 4 + [True]
            assert {output.request_id for output in outputs} == {"mine"}
            deltas = [delta async for delta in llm.stream("hello world", FIVE)]
            assert "".join(delta.text for delta in deltas) == outputs[-1].outputs[0].text
            chat = [output async for output in llm.chat([{"role": "user", "content": "hello"}], FIVE)]
            assert chat[-1].finished

    asyncio.run(work())


def test_requests_side_by_side_do_not_wait_for_one_another(simulated: dict[str, Any]) -> None:
    async def last(llm: AsyncLLM, prompt: str) -> int:
        return [len(output.outputs[0].token_ids) async for output in llm.generate(prompt, FIVE)][-1]

    async def work() -> None:
        async with AsyncLLM(**simulated) as llm:
            long = llm.generate("hello", SamplingParams(max_tokens=100_000, ignore_eos=True))
            await anext(long)
            assert await asyncio.gather(*(last(llm, "hello") for _ in range(20))) == [5] * 20
            await long.aclose()  # type: ignore[attr-defined]

    asyncio.run(work())


def test_a_request_s_fault_is_raised_to_its_caller_alone(simulated: dict[str, Any]) -> None:
    async def work() -> None:
        async with AsyncLLM(**simulated) as llm:
            with pytest.raises(RequestError, match="outside the vocabulary"):
                [output async for output in llm.generate([10**9], FIVE)]
            assert [output async for output in llm.generate("hello", FIVE)][-1].finished

    asyncio.run(work())


def test_the_constructor_returns_before_the_model_is_there_and_ready_says_what_is_wrong(
    simulated: dict[str, Any], tmp_path: Any
) -> None:
    async def work() -> None:
        llm = AsyncLLM(**simulated, **{"tracking.decision_log": tmp_path / "log.jsonl"})
        await asyncio.gather(llm.ready(), llm.ready())
        await llm.aclose()

    asyncio.run(work())
    assert (tmp_path / "log.jsonl").exists()
    with pytest.raises(ConfigError, match="no such directory"):
        AsyncLLM("/nowhere")
