"""pydantic-ai: two turns with a tool, through all three kinds of chat. Run by tools/clients_check.py."""

from __future__ import annotations

import asyncio
import os

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

url = os.environ["BASE_URL"]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
models = [
    OpenAIChatModel("scripted", provider=openai),
    OpenAIResponsesModel("scripted", provider=openai),
    AnthropicModel("scripted", provider=AnthropicProvider(base_url=url, api_key="none")),
]


def weather(city: str) -> str:
    """Weather of a city."""
    return f"rain in {city}"


async def events_of(agent: Agent) -> list:
    """Of one streamed run."""
    async with agent.run_stream_events("How is the weather?") as events:
        return [event async for event in events]


for model in models:
    agent = Agent(model, instructions="Report.", tools=[weather])
    first = agent.run_sync("How is the weather?")
    assert first.output == "Done.", first
    assert "rain in Oslo" in str(first.all_messages())
    second = agent.run_sync("And now?", message_history=first.all_messages())
    assert second.output == "Done.", second
    *_, last = asyncio.run(events_of(agent))
    assert last.result.output == "Done.", last
print("two turns with a tool, whole and streamed, over chats, responses and messages")
