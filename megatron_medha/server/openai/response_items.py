"""From the items of /v1/responses to the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from megatron_medha.server.bodies.openai_types import CalledFunction, ChatMessage, ContentPart, ToolCall
from megatron_medha.server.bodies.responses_types import InputItem, InputPart
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.openai.chat_prompt import ConversationHistory, not_text
from megatron_medha.server.openai.response_tools import custom_call_arguments, function_name

TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def read_items(
    items: str | list[InputItem], instructions: str | None, recall: Callable[[str], InputItem | None]
) -> ConversationHistory:
    """The chat that these items are; ApiError 400 for one that lacks what it needs or is not text.

    recall: finds the item that an item_reference names.
    """
    history = ConversationHistory()
    if instructions is not None:
        history.add(ChatMessage(role="system", content=instructions), "instructions")
    if isinstance(items, str):
        history.add(ChatMessage(role="user", content=items), "input")
        return history
    for place, item in enumerate(items):
        path = f"input[{place}]"
        if item.type == "item_reference":
            found = recall(item.id or "")
            if found is None:
                history.ignored.append(path)
                continue
            item = found
        _add_item(history, item, path)
    return history


def _add_item(history: ConversationHistory, item: InputItem, path: str) -> None:
    match item:
        case InputItem(type="message", role=str(role), content=str() | list() as content):
            history.add(ChatMessage(role=role, content=_content_of(content, f"{path}.content")), path)
        case InputItem(type="function_call", call_id=str(call_id), name=str(name)) if item.arguments is not None:
            _add_call(history, path, call_id, function_name(name, item.namespace), _as_text(item.arguments))
        case InputItem(type="custom_tool_call", call_id=str(call_id), name=str(name)) if item.input is not None:
            name = function_name(name, item.namespace)
            _add_call(history, path, call_id, name, custom_call_arguments(item.input))
        case InputItem(type="message" | "function_call" | "custom_tool_call"):
            raise bad_request(f"{path}: a {item.type} lacks some of its fields", path)
        case InputItem(type="function_call_output") if item.call_id is None or item.output is None:
            raise bad_request(f"{path}: a function_call_output lacks its call_id or its output", path)
        case _ if item.call_id is not None and item.type.endswith("_output") and item.output is not None:
            _add_output(history, path, item.call_id, item.output)
        case _ if item.type.endswith("_call") and (own_id := item.call_id or (item.id if item.output else None)):
            # A call of a tool that OpenAI defines: of a shell, of a patch, of an MCP server.
            arguments = {name: value for name in ("action", "operation", "input") if (value := getattr(item, name))}
            given = arguments if item.arguments is None else item.arguments
            _add_call(history, path, own_id, item.name or item.type.removesuffix("_call"), _as_text(given))
            if item.output is not None:
                _add_output(history, path, own_id, item.output)
        case InputItem(type="reasoning"):
            pass  # models do not read the reasoning of earlier turns
        case _:
            history.ignored.append(path)


def _add_call(history: ConversationHistory, path: str, call_id: str, name: str, arguments: str) -> None:
    """Add a call. Calls of one response are one message of the model, with the text before them."""
    if not history.messages or history.messages[-1].role != "assistant":
        history.add(ChatMessage(role="assistant"), path)
    last = history.messages[-1]
    last.tool_calls = last.tool_calls or []
    last.tool_calls.append(ToolCall(id=call_id, function=CalledFunction(name=name, arguments=arguments)))
    calls = f"messages[{len(history.messages) - 1}].tool_calls[{len(last.tool_calls) - 1}]"
    history.paths[calls] = path
    history.paths[f"{calls}.function"] = path


def _add_output(history: ConversationHistory, path: str, call_id: str, output: Any) -> None:
    try:
        parts = msgspec.convert(output, str | list[InputPart])
        is_text = isinstance(parts, str) or all(part.type for part in parts)
    except msgspec.ValidationError:
        is_text = False
    content = _content_of(parts, f"{path}.output") if is_text else _as_text(output)
    history.add(ChatMessage(role="tool", content=content, tool_call_id=call_id), path)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _content_of(content: str | list[InputPart], path: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*TEXT_PARTS, "refusal") or text is None:
            raise not_text(f"{path}[{place}]", "a part of type input_text or output_text", part.type, path)
        texts.append(ContentPart(type="text", text=text))
    return texts
