"""`medha chat`: options for cli/parts/chat_client.py."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_medha.cli.parts.chat_client import HELP, ChatConfig, chat
from megatron_medha.cli.parts.command_options import read_options

USAGE = """\
usage: medha chat [key=value ...]

Chats with a running server. {help}.

examples:
  medha chat
  medha chat url=http://127.0.0.1:8001 temperature=0.7 'system_prompt="Answer in one sentence."'
"""


def run(words: Sequence[str]) -> int:
    """Talk until /quit or the end of input."""
    config = read_options("chat", words, USAGE.format(help=HELP), lambda: ChatConfig)
    if config is not None:
        chat(config)
    return 0
