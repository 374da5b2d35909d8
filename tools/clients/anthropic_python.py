"""anthropic for Python: messages, streams, tools, token counts, errors. Run by tools/clients_check.py."""

from __future__ import annotations

import os
from typing import Any

import anthropic
from anthropic import beta_tool

client = anthropic.Anthropic(base_url=os.environ["BASE_URL"], api_key="none", max_retries=0)
messages: Any = [{"role": "user", "content": "How is the weather?"}]
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
common: Any = {"model": "scripted", "max_tokens": 200, "tools": [{"name": "weather", "input_schema": schema}],
               "system": [{"type": "text", "text": "Report.", "cache_control": {"type": "ephemeral"}}]}  # fmt: skip

first = client.messages.create(messages=messages, **common)
assert (first.stop_reason, first.content[-1].type) == ("tool_use", "tool_use"), first
result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "rain"}
history = [*messages, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
with client.messages.stream(messages=history, **common) as stream:
    text = "".join(stream.text_stream)
    last = stream.get_final_message()
assert text == "Done." and last.stop_reason == "end_turn" and last.usage.output_tokens == 6, last
with client.messages.stream(messages=messages, **common) as stream:
    calls = [event.content_block.input for event in stream if event.type == "content_block_stop"
             and event.content_block.type == "tool_use"]  # fmt: skip
assert calls == [{"city": "Oslo"}], calls
counted = client.messages.count_tokens(messages=history, **{k: v for k, v in common.items() if k != "max_tokens"})
assert counted.input_tokens == last.usage.input_tokens
assert [model.id for model in client.models.list()] == ["scripted"]


@beta_tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"rain in {city}"


runner = client.beta.messages.tool_runner(model="scripted", max_tokens=200, tools=[weather], messages=messages)
assert runner.until_done().content[0].text == "Done."
try:
    client.messages.create(model="claude-unknown", max_tokens=5, messages=messages)
except anthropic.NotFoundError as error:
    assert error.body["error"]["type"] == "not_found_error", error.body
else:
    raise AssertionError("an unknown model was served")
try:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    client.messages.create(messages=[{"role": "user", "content": [image]}], **common)
except anthropic.BadRequestError as error:
    assert "reads text alone" in str(error), error
else:
    raise AssertionError("an image was passed over")
print("messages and streams with a tool, tool runner, token counts, models, errors")
