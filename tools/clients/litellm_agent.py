"""litellm: two turns with a tool over chats, responses and messages. Run by tools/clients_check.py."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices first

import litellm  # noqa: E402

url = os.environ["BASE_URL"]
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
function = {"name": "weather", "description": "Weather of a city", "parameters": schema}
messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]

chat = {"model": "openai/scripted", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0,
        "tools": [{"type": "function", "function": function}]}  # fmt: skip
first = litellm.completion(messages=messages, **chat).choices[0].message
assert json.loads(first.tool_calls[0].function.arguments) == {"city": "Oslo"}, first
result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
parts = litellm.completion(messages=[*messages, first, result], stream=True, **chat)
assert "".join(part.choices[0].delta.content or "" for part in parts) == "Done."

respond = {**chat, "tools": [{"type": "function", **function}], "store": True, "truncation": "auto",
           "reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"]}  # fmt: skip
output = litellm.responses(input=messages, **respond).output
call = next(item for item in output if item.type == "function_call")
history = [*messages, *(item.model_dump() for item in output),
           {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]  # fmt: skip
events = list(litellm.responses(input=history, stream=True, **respond))
assert events[-1].response.output[0].content[0].text == "Done.", events[-1]


async def message() -> None:
    """Two turns over /v1/messages."""
    common = {"model": "anthropic/scripted", "api_base": url, "api_key": "none", "max_tokens": 200,
              "tools": [{"name": "weather", "input_schema": schema}]}  # fmt: skip
    said = await litellm.anthropic.messages.acreate(messages=messages, **common)
    call = said["content"][-1]
    assert (call["type"], call["input"]) == ("tool_use", {"city": "Oslo"}), said
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "rain"}
    more = [{"role": "assistant", "content": said["content"]}, {"role": "user", "content": [result]}]
    said = await litellm.anthropic.messages.acreate(messages=[*messages, *more], **common)
    assert said["content"] == [{"type": "text", "text": "Done."}], said


asyncio.run(message())
print("two turns with a tool over chats, responses and messages")
