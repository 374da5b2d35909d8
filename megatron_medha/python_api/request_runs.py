"""Running requests on the service's loop: all of a list to their ends, or one with its steps sent elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_medha.python_api.api_errors import EngineError, RequestError
from megatron_medha.python_api.growing_output import GrowingOutput
from megatron_medha.python_api.local_service import LocalService
from megatron_medha.python_api.outputs import CompletionOutput, RequestOutput
from megatron_medha.python_api.prompts_and_chats import RequestSource

T = TypeVar("T")


async def finish_all(
    local: LocalService, sources: Sequence[RequestSource], on_done: Callable[[RequestOutput], None]
) -> list[RequestOutput]:
    """The outputs of all requests, in their order; those of failed ones have an error."""
    outputs: dict[int, RequestOutput] = {}
    waiting = iter(enumerate(sources))

    async def work() -> None:
        for place, source in waiting:
            outputs[place] = await _finish(local, source)
            on_done(outputs[place])

    num_at_once = local.num_at_once(max((source.params.n for source in sources), default=1))
    async with asyncio.TaskGroup() as group:
        for _ in range(min(len(sources), num_at_once)):
            group.create_task(work())
    return [outputs[place] for place in range(len(sources))]


async def _finish(local: LocalService, source: RequestSource) -> RequestOutput:
    try:
        async with local.running(source) as (generation, growing):
            while generation.num_open:
                growing.add(await generation.next_piece())
            return growing.output()
    except (RequestError, EngineError) as error:
        prompt = source.prompt if isinstance(source.prompt, str) else None
        return RequestOutput(source.name or "", prompt, [], [], finished=True, error=error)


async def send_steps(
    local: LocalService,
    source: RequestSource,
    take: Callable[[GrowingOutput, CompletionOutput], T],
    put: Callable[[T | BaseException | None], None],
) -> None:
    """Put what `take` makes of the output and of what is new in it, after every step; then None, or why it failed."""
    end: BaseException | None = EngineError("the LLM was closed")
    try:
        async with local.running(source) as (generation, growing):
            while generation.num_open:
                put(take(growing, growing.add(await generation.next_piece())))
        end = None
    except Exception as error:
        end = error
    finally:
        put(end)
