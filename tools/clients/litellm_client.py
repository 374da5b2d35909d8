"""litellm: chat and text completion through its OpenAI provider. Run by tools/clients_check.py."""

from __future__ import annotations

import json
import os
import urllib.request

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices first

import litellm  # noqa: E402

url = os.environ["BASE_URL"]
with urllib.request.urlopen(f"{url}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]
common = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 8, "temperature": 0, "num_retries": 0}
messages = [{"role": "user", "content": "hello"}]

whole = litellm.completion(model=f"openai/{model}", messages=messages, **common)
assert whole.usage.completion_tokens > 0, whole
parts = litellm.completion(model=f"openai/{model}", messages=messages, stream=True, **common)
assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="def main():", **common)
assert text.choices[0].text
try:
    litellm.completion(model="openai/no-such-model", messages=messages, **common)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model was served")
print("chat whole and streamed, text completion, errors")
