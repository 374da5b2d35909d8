"""Prints docs/cli.md: what `medha COMMAND --help=all` says, for every command.

    python tools/cli_reference.py > docs/cli.md

The texts come from the commands' USAGE and from conf/ (megatron_medha/cli/parts/options_help.py): change those, not the
page. A test compares the page with what this prints.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from megatron_medha.cli.medha import COMMANDS, main, usage
from megatron_medha.cli.parts.options_help import COMMON_KEYS

_HEAD = """\
# Command line

Every command, group, option and key, as `medha COMMAND --help=all` shows them. Made by `python tools/cli_reference.py`
from `conf/` and the commands themselves; a test holds the two together.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    yield _block(usage())
    for name, summary in COMMANDS.items():
        yield f"## medha {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{_block(_help(name))}"


def _help(name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exit_code = main([name, "--help=all" if name in COMMON_KEYS else "--help"])
    assert exit_code == 0, f"medha {name} --help ended with {exit_code}"
    return printed.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
