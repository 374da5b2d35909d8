"""langchain: an agent with a tool, two turns, over chats and responses. Run by tools/clients_check.py."""

from __future__ import annotations

import os

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"rain in {city}"


for uses_responses in (False, True):
    model = ChatOpenAI(model="scripted", base_url=f"{os.environ['BASE_URL']}/v1", api_key="none", max_retries=0,
                       use_responses_api=uses_responses)  # fmt: skip
    agent = create_agent(model, tools=[weather], system_prompt="Report.")
    first = agent.invoke({"messages": [("user", "How is the weather?")]})["messages"]
    assert first[-1].text == "Done." and any("Oslo" in str(message.content) for message in first), first
    second = agent.invoke({"messages": [*first, ("user", "And now?")]})["messages"]
    assert second[-1].text == "Done." and len(second) > len(first) + 1, second
    parts = [part for part, _ in agent.stream({"messages": [("user", "Again?")]}, stream_mode="messages")]
    assert "".join(part.text for part in parts if part.type == "AIMessageChunk").endswith("Done."), parts
print("two turns with a tool, whole and streamed, over chats and responses")
