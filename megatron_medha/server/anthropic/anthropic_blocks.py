"""From the messages and blocks of /v1/messages to the messages and tools of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from megatron_medha.server.bodies.anthropic_types import (
    BlockSource,
    InputBlock,
    InputMessage,
    MessagesRequest,
    MessagesToolChoice,
)
from megatron_medha.server.bodies.openai_types import (
    CalledFunction,
    ChatMessage,
    ContentPart,
    FunctionDefinition,
    NamedFunction,
    ToolCall,
    ToolChoice,
)
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.openai.chat_prompt import ConversationHistory, not_text


def read_conversation(body: MessagesRequest) -> ConversationHistory:
    """The chat that these messages are; ApiError 400 for a block that is not text."""
    chat = ConversationHistory()
    if body.system:
        chat.add(ChatMessage(role="system", content=_text_of(body.system, "system")), "system")
    for place, message in enumerate(body.messages):
        _add_message(chat, message, f"messages[{place}]")
    for place, tool in enumerate(body.tools or ()):
        if tool.input_schema is None and tool.type not in (None, "custom"):
            chat.ignored.append(f"tools[{place}]")
            continue
        function = FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        chat.add_tool(function, f"tools[{place}]")
    return chat


def chat_choice(choice: MessagesToolChoice | None) -> str | ToolChoice | None:
    """Anthropic's tool_choice as OpenAI's."""
    match choice:
        case None:
            return None
        case MessagesToolChoice(type="any"):
            return "required"
        case MessagesToolChoice(type="auto" | "none"):
            return choice.type
        case MessagesToolChoice(type="tool", name=str(name)):
            return ToolChoice(type="function", function=NamedFunction(name=name))
        case _:
            raise bad_request("tool_choice: expected type auto, any, none, or tool with a name", "tool_choice")


def _add_message(chat: ConversationHistory, message: InputMessage, path: str) -> None:
    if isinstance(message.content, str):
        chat.add(ChatMessage(role=message.role, content=message.content), path)
        return
    parts: list[ContentPart] = []
    calls: list[ToolCall] = []
    for place, block in enumerate(message.content):
        where = f"{path}.content[{place}]"
        match block:
            case InputBlock(type="tool_use", id=str(call_id), name=str(name)):
                arguments = msgspec.json.encode(block.input or {}).decode()
                calls.append(ToolCall(id=call_id, function=CalledFunction(name=name, arguments=arguments)))
            case InputBlock(type="tool_result", tool_use_id=str(call_id)):
                # A result is a message of its own, after what the user wrote before it.
                _add_parts(chat, message.role, parts, path)
                parts = []
                chat.add(ChatMessage(role="tool", tool_call_id=call_id, content=_result_of(block, where)), where)
            case InputBlock(type="tool_use" | "tool_result"):
                raise bad_request(f"{where}: a {block.type} lacks some of its fields", where)
            case InputBlock(type="thinking" | "redacted_thinking"):
                pass  # models do not read the reasoning of earlier turns
            case _ if block.type == "server_tool_use" or block.type.endswith("_tool_result"):
                chat.ignored.append(where)  # what Anthropic's servers did and found
            case _:
                parts.append(ContentPart(type="text", text=_text_of_block(block, where)))
    if calls:
        chat.add(ChatMessage(role=message.role, content=parts or None, tool_calls=calls), path)
    else:
        _add_parts(chat, message.role, parts, path, is_empty_kept=not message.content)


def _add_parts(
    chat: ConversationHistory, role: str, parts: Sequence[ContentPart], path: str, *, is_empty_kept: bool = False
) -> None:
    if parts or is_empty_kept:
        chat.add(ChatMessage(role=role, content=list(parts)), path)


def _result_of(block: InputBlock, path: str) -> str:
    content = "" if block.content is None else _content_of(block.content, f"{path}.content")
    text = _text_of(content, f"{path}.content")
    return f"Error: {text}" if block.is_error else text


def _text_of(content: str | list[InputBlock], path: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text_of_block(block, f"{path}[{place}]") for place, block in enumerate(content))


def _text_of_block(block: InputBlock, path: str) -> str:
    match block:
        case InputBlock(type="text", text=str(text)):
            return text
        case InputBlock(type="document", source=BlockSource(type="text", data=str(text))):
            return _titled(block, text)
        case InputBlock(type="document", source=BlockSource(type="content", content=str() | list() as content)):
            return _titled(block, _text_of(content, f"{path}.source.content"))
        case InputBlock(type="search_result", content=list() as content):
            text = _text_of(_content_of(content, f"{path}.content"), f"{path}.content")
            return _titled(block, f"{block.source}\n{text}" if isinstance(block.source, str) else text)
        case InputBlock(type="tool_reference"):
            return msgspec.json.encode(block.name or "").decode()
        case _:
            raise not_text(path, "a block of type text", block.type, path)


def _content_of(content: Any, path: str) -> str | list[InputBlock]:
    # Decoded late: what a server's tool found has shapes of its own, and is left out.
    try:
        return msgspec.convert(content, str | list[InputBlock])
    except msgspec.ValidationError as error:
        raise bad_request(f"{path}: {error}", path) from None


def _titled(block: InputBlock, text: str) -> str:
    return "\n".join(part for part in (block.title, block.context, text) if part)
