"""A description of tools in words, for chat templates that have no place for tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

SYSTEM_ROLES = ("system", "developer")
_BEFORE_FUNCTIONS = "These functions can be called. Each line is one, with a JSON schema of its parameters:"
_AFTER_FUNCTIONS = """To call a function, write the call in this form:
<tool_call>
{"name": "the function's name", "arguments": {"a parameter": "its value"}}
</tool_call>
Several calls may follow one another. What they return comes in <tool_response>. Call a function where it is needed; \
otherwise answer in words."""


def with_description(
    messages: Iterable[dict[str, Any]], definitions: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The chat where the system describes the tools; at least one message."""
    description = _description_of(definitions)
    for place, message in enumerate(messages):
        if place == 0 and message["role"] in SYSTEM_ROLES:
            message = {**message, "content": f"{message['content']}\n\n{description}"}
        elif place == 0:
            yield {"role": "system", "content": description}
        yield message


def _description_of(definitions: Sequence[dict[str, Any]]) -> str:
    functions = "\n".join(json.dumps(definition["function"], ensure_ascii=False) for definition in definitions)
    return f"{_BEFORE_FUNCTIONS}\n{functions}\n\n{_AFTER_FUNCTIONS}"
