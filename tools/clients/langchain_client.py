"""langchain-openai: chat and completion models, whole, streamed, batched, async. Run by tools/clients_check.py."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request

from langchain_openai import ChatOpenAI, OpenAI

url = os.environ["BASE_URL"]
with urllib.request.urlopen(f"{url}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]
chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", max_tokens=8, temperature=0, max_retries=0)

whole = chat.invoke("hello")
assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 0, whole
assert "".join(part.content for part in chat.stream("hello")) == whole.content
assert len(chat.batch(["a", "b", "c"])) == 3
assert asyncio.run(chat.ainvoke("hello")).content == whole.content
llm = OpenAI(model=model, base_url=f"{url}/v1", api_key="none", max_tokens=8, temperature=0, max_retries=0)
assert "".join(llm.stream("def main():")) == llm.invoke("def main():")
print("chat and completion models, whole, streamed, batched, async")
