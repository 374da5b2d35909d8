"""claude-agent-sdk for Python, with the Claude Code it brings: two turns, its shell and a tool of ours. Run by
tools/clients_check.py."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage, create_sdk_mcp_server, tool

NAMES = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL")
environment = {"ANTHROPIC_BASE_URL": os.environ["BASE_URL"], "ANTHROPIC_AUTH_TOKEN": "none",
               "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", **dict.fromkeys(NAMES, "scripted")}  # fmt: skip


@tool("weather", "Weather of a city", {"city": str})
async def weather(arguments: dict[str, Any]) -> dict[str, Any]:
    """The tool that is on offer."""
    return {"content": [{"type": "text", "text": f"rain in {arguments['city']}"}]}


async def main() -> None:
    """Two turns."""
    ours = create_sdk_mcp_server("ours", tools=[weather])
    options = ClaudeAgentOptions(
        env=environment, model="scripted", mcp_servers={"ours": ours}, allowed_tools=["Bash", "mcp__ours__weather"],
        setting_sources=[],
    )  # fmt: skip
    async with ClaudeSDKClient(options) as client:
        for prompt in ("Say medha.", "Once more."):
            await client.query(prompt)
            messages = [message async for message in client.receive_response()]
            assert isinstance(messages[-1], ResultMessage), messages
            assert (messages[-1].is_error, messages[-1].result, messages[-1].num_turns) == (False, "Done.", 2), messages
            assert any("medha" in str(message) for message in messages if type(message).__name__ == "UserMessage")


asyncio.run(main())
print("two turns with its shell, a tool of ours on offer")
