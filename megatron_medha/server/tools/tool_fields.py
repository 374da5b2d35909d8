"""Tools a chat may call: the fields of a request, checked, and what a completion that must call one has to match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from megatron_medha.server.bodies.openai_types import AllowedTools, NamedFunction, Tool, ToolChoice
from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.tools.structured_output import OutputConstraint, json_constraint
from megatron_medha.text.chat.call_syntax import ToolSyntax, syntax_of_template
from megatron_medha.text.chat.chat_template import ChatTemplate

MAX_TOOLS = 512           # agents with several servers of tools offer more than OpenAI's 128
MAX_REQUIRED_CALLS = 16   # of one completion that must call; a model that does not end by itself has to be ended
# OpenAI's characters, and dots, which servers of tools use; Anthropic's length, which is twice OpenAI's.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """How a completion may call tools."""

    syntax: ToolSyntax
    names: frozenset[str]
    guide: OutputConstraint | None = None     # what makes it call: tool_choice required, or a tool by name
    only: str | None = None        # the tool that must be called
    is_parallel: bool = True       # whether several calls are answered
    reasoning_end: str | None = None  # where the prompt has opened the model's reasoning, the mark that ends it
    definitions: tuple[dict[str, Any], ...] = ()  # as the template gets them

    @property
    def schemas(self) -> dict[str, Any]:
        """Of each tool's arguments, where it has one."""
        functions = [definition["function"] for definition in self.definitions]
        return {function["name"]: function.get("parameters") for function in functions}


def tool_use(
    tools: Sequence[Tool] | None,
    choice: ToolChoice | str | None,
    *,
    is_parallel: bool | None,
    syntax: ToolSyntax,
) -> ToolUse | None:
    """How a completion to this request may call tools; None where it may not. ApiError 400 for what does not fit.

    syntax: in which the model calls.
    """
    tools, choice = _usable(tools, choice)
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice: only together with tools", "tool_choice")
        return None
    check_tools(tools)
    if choice == "none":
        return None
    definitions: tuple[dict[str, Any], ...] = tuple(msgspec.to_builtins(tool) for tool in tools)
    schemas = {definition["function"]["name"]: definition for definition in definitions}
    use = ToolUse(
        syntax=syntax, names=frozenset(schemas), is_parallel=is_parallel is not False, definitions=definitions
    )
    match choice:
        case None | "auto":
            return use
        case "required":
            call = call_schema(definitions)
            schema = {
                "$defs": call["$defs"], "type": "array", "minItems": 1,
                "maxItems": MAX_REQUIRED_CALLS if use.is_parallel else 1, "items": {"anyOf": call["anyOf"]},
            }  # fmt: skip
            return replace(use, syntax=ToolSyntax.LIST, guide=json_constraint(schema, "tools"))
        case ToolChoice(type="function", function=NamedFunction(name=name)):
            if name not in schemas:
                raise bad_request(f"tool_choice: there is no tool `{name[:64]}` among tools", "tool_choice")
            guide = json_constraint(_arguments_schema(schemas[name]), "tools")
            return replace(use, syntax=ToolSyntax.ARGUMENTS, guide=guide, only=name)
        case _:
            raise bad_request(
                'tool_choice: expected none, auto, required or {"type": "function", "function": {"name": ...}}',
                "tool_choice",
            )


def _usable(
    tools: Sequence[Tool] | None, choice: ToolChoice | str | None
) -> tuple[list[Tool], ToolChoice | str | None]:
    """Without those that a server of the client's provider would run, and those that the choice does not allow."""
    kept = [tool for tool in tools or () if tool.type == "function"]
    match choice:
        case ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=allowed)):
            names = {tool.function.name for tool in allowed if tool.function is not None}
            return [tool for tool in kept if tool.function is None or tool.function.name in names], mode
        case ToolChoice(type="allowed_tools"):
            raise bad_request("tool_choice.allowed_tools: expected an object with mode and tools", "tool_choice")
        case _:
            return kept, choice


def tools_left_out(tools: Sequence[Tool] | None) -> tuple[str, ...]:
    """Paths of those that cannot be called here."""
    return tuple(f"tools[{place}]" for place, tool in enumerate(tools or ()) if tool.type != "function")


def definitions_of(tools: ToolUse | None) -> tuple[dict[str, Any], ...]:
    """What a chat template gets. Many templates go through the parameters of every function."""
    return () if tools is None else tuple(_with_parameters(definition) for definition in tools.definitions)


def check_tools(tools: Sequence[Tool]) -> None:
    """ApiError 400 for tools that cannot be."""
    if len(tools) > MAX_TOOLS:
        raise too_many_tools()
    names = set()
    for place, tool in enumerate(tools):
        param = f"tools[{place}]"
        if tool.function is None:
            raise bad_request(f"{param}.function: expected the function's name and parameters", f"{param}.function")
        if not _NAME.match(tool.function.name):
            raise bad_request(
                f"{param}.function.name: expected 1 to 128 letters, digits, `_`, `-` or `.`", f"{param}.function.name"
            )
        if tool.function.name in names:
            raise bad_request(f"{param}.function.name: `{tool.function.name}` is there twice", f"{param}.function.name")
        names.add(tool.function.name)


def too_many_tools() -> ApiError:
    """A 400 for more than MAX_TOOLS."""
    return bad_request(f"tools: at most {MAX_TOOLS}", "tools")


def syntax_of(configured: str, template: ChatTemplate) -> ToolSyntax | None:
    """How the model calls: as configured, or as its chat template shows; None where it does not, or knows no tools."""
    if not template.uses_tools:
        return None
    return syntax_of_template(template.source) if configured == "auto" else ToolSyntax(configured)


def call_schema(definitions: Sequence[dict[str, Any]], arguments_key: str = "arguments") -> dict[str, Any]:
    """Of one call of any of these tools as a JSON object."""
    inner, calls = {}, []
    for place, definition in enumerate(definitions):
        root = f"#/$defs/tool{place}"
        schema = _arguments_schema(definition)
        own_id = schema.get("$id")
        inner[f"tool{place}"] = _moved(schema, root, own_id if isinstance(own_id, str) else "")
        calls.append({
            "type": "object",
            "properties": {"name": {"const": definition["function"]["name"]}, arguments_key: {"$ref": root}},
            "required": ["name", arguments_key],
            "additionalProperties": False,
        })  # fmt: skip
    return {"$defs": inner, "anyOf": calls}


def _with_parameters(definition: dict[str, Any]) -> dict[str, Any]:
    function = definition["function"]
    parameters = dict(function.get("parameters") or {})
    for name, value in (("type", "object"), ("properties", {})):
        if parameters.get(name) is None:
            parameters[name] = value
    return {**definition, "function": {**function, "parameters": parameters}}


def _arguments_schema(definition: dict[str, Any]) -> dict[str, Any]:
    # Arguments are always an object; without parameters it is an empty one.
    given = definition["function"].get("parameters")
    if given is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**given, "type": "object"}


def _moved(schema: Any, root: str, own_id: str = "") -> Any:
    """The same schema where its own root, which own_id may name, lies at `root` of another."""
    match schema:
        case dict():
            moved = {}
            for key, value in schema.items():
                match key, value:
                    case "$ref", str():
                        moved[key] = _moved_pointer(value.removeprefix(own_id) or "#", root)
                    case "$anchor", str():
                        moved[key] = _moved_pointer(f"#{value}", root)[1:]
                    case ("const" | "enum" | "default" | "examples"), _:
                        moved[key] = value
                    case _:
                        moved[key] = _moved(value, root, own_id)
            return moved
        case list():
            return [_moved(value, root, own_id) for value in schema]
        case _:
            return schema


def _moved_pointer(pointer: str, root: str) -> str:
    if pointer.startswith("#") and pointer[1:2] not in ("", "/"):
        return f"#{root.rpartition('/')[2]}.{pointer[1:]}"  # anchors of several schemas may be the same
    return root + pointer[1:] if pointer.startswith("#") else pointer
