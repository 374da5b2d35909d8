"""openai-agents: two turns with a function tool, through /v1/responses and chats. Run by tools/clients_check.py."""

from __future__ import annotations

import asyncio
import os

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{os.environ['BASE_URL']}/v1", api_key="none", max_retries=0)


@function_tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"rain in {city}"


async def run(model: object) -> None:
    """Two turns whole, one streamed."""
    agent = Agent(name="reporter", instructions="Report.", tools=[weather], model=model)
    first = await Runner.run(agent, "How is the weather?")
    assert first.final_output == "Done.", first
    assert any(item.type == "tool_call_output_item" and "Oslo" in item.output for item in first.new_items)
    second = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And now?"}])
    assert second.final_output == "Done.", second
    streamed = Runner.run_streamed(agent, "How is the weather?")
    kinds = [event.type async for event in streamed.stream_events()]
    assert streamed.final_output == "Done." and "run_item_stream_event" in kinds


async def main() -> None:
    """Both kinds of model."""
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        await run(kind("scripted", client))


asyncio.run(main())
print("two turns with a tool, whole and streamed, over responses and chats")
