"""inspect-ai: an evaluation whose model calls a tool, over all three kinds of chat. Run by tools/clients_check.py."""

from __future__ import annotations

import os

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, tool

url = os.environ["BASE_URL"]


@tool
def weather() -> Tool:
    """The tool that is on offer."""
    async def execute(city: str) -> str:
        """Weather of a city.

        Args:
            city: Its name.
        """
        return f"rain in {city}"

    return execute


models = [
    get_model("openai/scripted", base_url=f"{url}/v1", api_key="none", responses_api=False),
    get_model("openai/scripted", base_url=f"{url}/v1", api_key="none", responses_api=True),
    get_model("openai-api/medha/scripted", base_url=f"{url}/v1", api_key="none"),
    get_model("anthropic/scripted", base_url=url, api_key="none"),
]
task = Task(dataset=[Sample(input="How is the weather?", target="Done")], solver=[use_tools(weather()), generate()],
            scorer=includes())  # fmt: skip
for model in models:
    (log,) = eval(task, model=model, display="none", log_dir="inspect_logs", max_retries=0)
    assert log.status == "success", log.error
    (sample,) = log.samples or ()
    assert sample.scores is not None and sample.scores["includes"].value == "C", sample
    assert any(message.role == "tool" and "Oslo" in message.text for message in sample.messages), sample.messages
print("an evaluation with a tool over chats (two providers), responses and messages")
