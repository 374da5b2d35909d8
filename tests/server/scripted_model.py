"""A model that calls a tool where one is offered, and after the call's result says that it is done: for agents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine, Rule
from running_server import byte_tokenizer_backend

from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.text.tokenizer import Tokenizer

END = 257
MODEL = "scripted"
FIRST, FINAL = "I will look.", "Done."
TEMPLATE = (
    "{% for tool in tools or [] %}<|tool_name|>{{ tool.function.name }}\n{% endfor %}{# calls: <tool_call> #}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<|call|>{{ call.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The tools that are called where a client offers them, in this order, and with what.
CALLS: dict[str, dict[str, Any]] = {
    "weather": {"city": "Oslo"},
    "exec_command": {"cmd": "echo medha"},
    "Bash": {"command": "echo medha", "description": "Say it"},
}


def scripted_text(prompt: str) -> str:
    """What the model says to this prompt."""
    _, _, last = prompt.rpartition("<|user|>")
    if "<|tool|>" not in last:
        for name, arguments in CALLS.items():
            if f"<|tool_name|>{name}\n" in prompt:
                call = json.dumps({"name": name, "arguments": arguments})
                return f"{FIRST}\n<tool_call>\n{call}\n</tool_call>"
    return FINAL


def scripted_rule() -> Rule:
    """The tokens of scripted_text."""
    said: dict[str, bytes] = {}

    def next_token(request: Request, prompt: Sequence[int], sampling: Sampling, place: int) -> int:
        if place == 0:
            said[request.request_id] = scripted_text(bytes(one for one in prompt if one < 256).decode()).encode()
        text = said[request.request_id]
        return text[place] if place < len(text) else END

    return next_token


def scripted_engine() -> FakeEngine:
    """Room for the prompts of coding agents, a token for each byte."""
    return FakeEngine(rule=scripted_rule(), max_request_tokens=2_000_000)


def scripted_tokenizer(directory: Path) -> Tokenizer:
    """Bytes, with this model's template; written to that directory first."""
    byte_tokenizer_backend().save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(directory)
