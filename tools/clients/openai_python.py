"""The openai package for Python: completions, chat, streams, usage, logprobs, errors. Run by tools/clients_check.py."""

from __future__ import annotations

import os

import openai

client = openai.OpenAI(base_url=f"{os.environ['BASE_URL']}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id

whole = client.completions.create(model=model, prompt="def main():", max_tokens=8, temperature=0, logprobs=1)
assert whole.usage is not None and whole.usage.completion_tokens == 8, whole
assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.tokens or ()) == 8

parts = list(client.completions.create(
    model=model, prompt="def main():", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True},
))  # fmt: skip
assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == 8

messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
chat = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=8, n=2, seed=1)
assert len(chat.choices) == 2 and chat.choices[0].message.role == "assistant"
events = list(client.chat.completions.create(model=model, messages=messages, max_tokens=8, seed=1, stream=True))
assert events[0].choices[0].delta.role == "assistant" and events[-1].choices[0].finish_reason in ("stop", "length")

several = client.completions.create(model=model, prompt=["a", "b"], max_tokens=2, n=2)
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
try:
    client.completions.create(model="no-such-model", prompt="x")
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
else:
    raise AssertionError("an unknown model was served")
endless = {"ignore_eos": True}
leaving = client.completions.create(model=model, prompt="x", max_tokens=2000, stream=True, extra_body=endless)
next(iter(leaving))
leaving.close()
print("completions, streams, chat, several prompts and choices, logprobs, usage, errors, a stream left early")
