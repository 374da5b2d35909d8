"""Finds the `medha` command lines that a Markdown page shows, with the error that it says they end with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_NAME = "medha"
_INLINE = re.compile(r"`medha ([^`]+)`")
_PROMPT = re.compile(r"^(\$ |> )?(\w+=\S+ )*(\.venv/bin/)?(?=medha )")


@dataclass(frozen=True, slots=True)
class Shown:
    """A command line on a page."""

    line: int
    words: tuple[str, ...]     # without `medha`
    error: str | None = None   # what the page says it prints


def commands_in(text: str) -> Iterator[Shown]:
    """Every command of a page, in fenced and indented blocks, in tables and in sentences."""
    lines = text.splitlines()
    is_fenced = is_output = False
    index = 0
    while index < len(lines):
        first, line = index, lines[index]
        index += 1
        if line.lstrip().startswith("```"):
            is_fenced, is_output = not is_fenced, line.strip() == "```text"
        elif is_output and not line.startswith(f"  {_NAME} "):
            continue  # what a program prints, with examples among it
        elif is_fenced or line.startswith("    "):
            while line.endswith("\\") and index < len(lines):
                line, index = line[:-1] + lines[index].strip(), index + 1
            following = lines[index].strip() if index < len(lines) else ""
            for part in line.strip().split(" && "):
                yield from _command(first + 1, _PROMPT.sub("", part.strip()), following)
        else:
            for match in _INLINE.finditer(line):
                yield from _command(first + 1, f"medha {match[1]}", "")


def _command(line: int, text: str, following: str) -> Iterator[Shown]:
    if not re.match(r"medha [a-zA-Z-]+( |$)", text):  # not `medha serve: ...` either, which it prints
        return
    words = [word for word in shlex.split(text, comments=True) if word != "&"]
    words = words[: words.index(">")] if ">" in words else words
    if len(words) > 1:
        name = words[1]
        is_error = following.startswith(f"medha {name}: ")
        yield Shown(line, tuple(words[1:]), following.removeprefix(f"medha {name}: ") if is_error else None)
