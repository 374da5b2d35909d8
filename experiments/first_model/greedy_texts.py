"""Greedy chat answers of a model in a GGUF file: of `medha serve`, and of transformers, which reads the file itself."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "What is 12 + 30?",
    "Write one sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "How many days does a week have?",
    "Translate 'good morning' to Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Write a Python function that adds two numbers.",
    "What does HTTP stand for?",
    "Tell me a joke about a cat.",
    "What is the largest planet in the solar system?",
    "Explain photosynthesis to a child.",
    "List the months of the year.",
    "What happened in 1969?",
    "Describe a tree in ten words.",
    "Is the number 17 prime?",
    "Write a haiku about snow ❄.",
    "Summarise in one sentence: a server answers requests; each request has a prompt; prompts differ in length.",
)
MAX_TOKENS = 64


class Answer(NamedTuple):
    """A prompt's tokens, and what was written after it."""

    prompt_ids: list[int]
    text: str


def served(url: str, questions: Sequence[str] = QUESTIONS) -> list[Answer]:
    """The answers of a running server."""
    answers = []
    for question in questions:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MAX_TOKENS,
            "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            found = json.load(response)
        answers.append(Answer(found["prompt_token_ids"], found["choices"][0]["message"]["content"]))
    return answers


def of_transformers(gguf: Path, questions: Sequence[str] = QUESTIONS) -> list[Answer]:
    """The answers of transformers in fp32, from the same file, its tokenizer and template included."""
    import gguf as gguf_package
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = transformers.LlamaConfig(**load_gguf_checkpoint(str(gguf))["config"])
    model = transformers.LlamaForCausalLM(config).float()
    loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
    missing, surplus = model.load_state_dict(loaded["tensors"], strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surplus, (missing, surplus)
    model.tie_weights()
    model.eval()
    fields = gguf_package.GGUFReader(str(gguf)).fields
    template, end_id = (fields[f"tokenizer.{name}"].contents() for name in ("chat_template", "ggml.eos_token_id"))
    answers = []
    for question in questions:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], chat_template=template, tokenize=False, add_generation_prompt=True,
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=end_id,
                eos_token_id=end_id,
            )  # fmt: skip
        answers.append(Answer(ids, tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)))
    return answers
