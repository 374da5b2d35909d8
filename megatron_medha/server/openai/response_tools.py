"""Tools as /v1/responses has them, as functions of a chat; and how a client knows the function that was called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_medha.server.bodies.openai_types import FunctionDefinition, NamedFunction, ToolChoice
from megatron_medha.server.bodies.responses_types import ResponseTool, ResponseToolChoice
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.openai.chat_prompt import ConversationHistory

# A custom tool takes text; here it is a function whose only argument is that text.
TEXT_ARGUMENT = "input"
_TEXT_PARAMETERS = {
    "type": "object", "properties": {TEXT_ARGUMENT: {"type": "string"}}, "required": [TEXT_ARGUMENT],
    "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KnownTool:
    """What a client calls a function of the chat."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class ResponseTools:
    """A request's tools, as the client sent them and by the names of the chat's functions."""

    choice: str | ToolChoice | None
    known: dict[str, KnownTool]
    shown: list[ResponseTool]     # without those that are left out


def add_tools(
    history: ConversationHistory, tools: Sequence[ResponseTool] | None, choice: str | ResponseToolChoice | None
) -> ResponseTools:
    """Functions, custom tools and namespaces as functions; what OpenAI's own servers would run is left out."""
    allowed, chosen = _chosen(choice)
    known: dict[str, KnownTool] = {}
    shown: list[ResponseTool] = []
    for place, tool in enumerate(tools or ()):
        num_before = len(known)
        for namespace, one, path in _members(tool, f"tools[{place}]"):
            if one.type not in ("function", "custom"):
                history.ignored.append(path)
                continue
            function = _function_of(one, namespace)
            known[function.name] = KnownTool(one.name, namespace, one.type == "custom")
            if allowed is None or function.name in allowed:
                history.add_tool(function, path)
        if len(known) > num_before:
            shown.append(tool)
    return ResponseTools(chosen, known, shown)


def function_name(name: str, namespace: str | None) -> str:
    """What a tool is called in the chat."""
    return name if namespace is None else f"{namespace}.{name}"


def custom_call_arguments(text: Any) -> str:
    """A custom tool's text as the arguments of its function."""
    return msgspec.json.encode({TEXT_ARGUMENT: text}).decode()


def text_argument(arguments: str) -> str:
    """The text of a custom tool's call; all that was written where it was cut."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, str])[TEXT_ARGUMENT]
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError):
        return arguments


def _members(tool: ResponseTool, path: str) -> Iterator[tuple[str | None, ResponseTool, str]]:
    if tool.type != "namespace":
        yield None, tool, path
        return
    for place, one in enumerate(tool.tools or ()):
        yield tool.name, one, f"{path}.tools[{place}]"


def _function_of(tool: ResponseTool, namespace: str | None) -> FunctionDefinition:
    name = function_name(tool.name, namespace)
    if tool.type == "function":
        return FunctionDefinition(
            name=name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
    description = tool.description
    if isinstance(tool.format, dict) and tool.format.get("type") == "grammar":
        grammar = f"{TEXT_ARGUMENT} matches this {tool.format.get('syntax')} grammar:\n{tool.format.get('definition')}"
        description = f"{description}\n{grammar}" if description else grammar
    return FunctionDefinition(name=name, description=description, parameters=_TEXT_PARAMETERS)


def _chosen(choice: str | ResponseToolChoice | None) -> tuple[set[str] | None, str | ToolChoice | None]:
    """The names of the tools that may be called, if not all, and the choice among them."""
    match choice:
        case ResponseToolChoice(type="function" | "custom"):
            name = function_name(choice.name, choice.namespace)
            return None, ToolChoice(type="function", function=NamedFunction(name=name))
        case ResponseToolChoice(type="allowed_tools"):
            allowed = {function_name(one.name, namespace)
                       for tool in choice.tools or () for namespace, one, _ in _members(tool, "")}  # fmt: skip
            return allowed, choice.mode
        case ResponseToolChoice():
            raise bad_request(
                f"tool_choice: a tool of type `{choice.type[:40]}` cannot be called here; expected none, auto, "
                "required, or a tool of type function or custom by its name", "tool_choice", "unsupported_parameter",
            )  # fmt: skip
        case _:
            return None, choice
