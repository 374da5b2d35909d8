"""A transcript of scripted_server.py, shortened to what tests need: shapes without the client's own prose.

    python tools/clients/shorten_transcript.py transcript.jsonl NAME VERSION > tests/server/transcripts/NAME.json

Long texts become their length, tools keep their first properties, and a request is dropped if the same one is there
already and nothing refers to its answer. Ids that our answers had become {request.place}.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

MAX_CHARS = 40
MAX_PROPERTIES = 2
CALLED = ("weather", "exec_command", "Bash", "mcp__ours__weather")
MAX_OTHER_TOOLS = 2
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Of headers those that say something about the API; names alone, since values are the client's own.
HEADERS = ("authorization", "x-api-key", "anthropic-version", "anthropic-beta", "accept", "user-agent")


def main() -> None:
    """Prints the fixture."""
    path, name, version = sys.argv[1:]
    recorded = Path(path).read_text(encoding="utf-8").splitlines()
    kept = worth_keeping([shortened(json.loads(with_places(line, recorded))) for line in recorded])
    lines = ",\n".join(json.dumps(request) for request in kept)
    print(f'{{"client": "{name}", "version": "{version}", "requests": [\n{lines}\n]}}')


def with_places(line: str, lines: list[str]) -> str:
    """The line with our ids as {request.place}."""
    for number, other in enumerate(lines):
        for place, one in enumerate(json.loads(other)["ids"]):
            line = line.replace(one, f"{{{number}.{place}}}")
    return line


def shortened(request: dict[str, Any]) -> dict[str, Any]:
    """One request."""
    body = request["body"]
    if isinstance(body, dict) and "tools" in body:
        body["tools"] = [short_tool(tool) for tool in few_tools(body["tools"])]
    headers = [header for header in request["headers"] if header in HEADERS]
    return {**request, "headers": headers, "body": short(body)}


def few_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are called, those that are no functions, and a few others."""
    is_plain = [tool.get("type", "custom") in ("function", "custom") and "grammar" not in str(tool) for tool in tools]
    others = [tool for tool, plain in zip(tools, is_plain, strict=True) if plain and name_of(tool) not in CALLED]
    return [tool for tool, plain in zip(tools, is_plain, strict=True)
            if not plain or name_of(tool) in CALLED or tool in others[:MAX_OTHER_TOOLS]]  # fmt: skip


def name_of(tool: dict[str, Any]) -> str:
    """Of a tool on any route."""
    return str(tool.get("name") or tool.get("function", {}).get("name"))


def short_tool(value: Any) -> Any:
    """A tool with few properties and no descriptions."""
    if isinstance(value, list):
        return [short_tool(one) for one in value[:MAX_PROPERTIES]]
    if not isinstance(value, dict):
        return value
    found = {key: short_tool(one) for key, one in value.items()}
    if isinstance(found.get("description"), str):
        found["description"] = "text"
    if isinstance(properties := found.get("properties"), dict):
        required = found.get("required") or []
        names = [*(name for name in properties if name in required), *properties][:MAX_PROPERTIES]
        found["properties"] = {name: properties[name] for name in properties if name in names}
        found["required"] = [name for name in required if name in names]
    return found


def short(value: Any) -> Any:
    """Anything, with short texts."""
    match value:
        case str():
            value = UUID.sub("uuid", value)
            return value if len(value) <= MAX_CHARS else f"({len(value)} characters)"
        case list():
            return [short(one) for one in value]
        case dict():
            return {key: short(one) for key, one in value.items()}
        case _:
            return value


def worth_keeping(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With their numbers, the first of each shape and those whose answers the kept ones refer to."""
    shapes = [shape(request) for request in requests]
    numbers = {shapes.index(one) for one in shapes}
    for number in reversed(range(len(requests))):
        if number in numbers:
            numbers |= {int(one) for one in re.findall(r"\{(\d+)\.\d+\}", json.dumps(requests[number]["body"]))}
    return [{"number": number, **{key: value for key, value in requests[number].items() if key != "ids"}}
            for number in sorted(numbers)]  # fmt: skip


def shape(request: dict[str, Any]) -> str:
    """What makes a request another one: its route, its fields and the kinds of its items."""
    return re.sub(r"\{\d+\.\d+\}", "{}", json.dumps([request["path"], request["status"], request["body"]]))


if __name__ == "__main__":
    main()
