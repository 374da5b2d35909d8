"""`medha chat`: options for cli/parts/chat_client.py."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_medha.cli.parts.arguments import parse_arguments
from megatron_medha.cli.parts.chat_client import HELP, ChatConfig, chat
from megatron_medha.cli.parts.options_help import describe_options

USAGE = """\
usage: medha chat [key=value ...]

Talks to a running server. {help}.

examples:
  medha chat
  medha chat url=http://127.0.0.1:8001 temperature=0.7 'system_prompt="Answer in one sentence."'
"""


def run(words: Sequence[str]) -> int:
    """Talk until /quit or the end of input."""
    arguments = parse_arguments(words)
    if arguments.wants_help:
        print(USAGE.format(help=HELP), describe_options("chat"), sep="\n", end="")
        return 0
    from megatron_medha.options.compose import compose, freeze

    config = compose("chat", ChatConfig, arguments.overrides, arguments.config_dir)
    if arguments.shows_config:
        from megatron_medha.options.compose import as_yaml

        print(as_yaml(config, arguments.resolves_config), end="")
        return 0
    chat(freeze(config, ChatConfig))
    return 0
