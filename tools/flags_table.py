"""Writes the table of flags in docs/from_vllm.md, from megatron_medha/cli/parts/known_flags.toml.

    python tools/flags_table.py

A test compares the page with the table.
"""

from __future__ import annotations

from pathlib import Path

from megatron_medha.cli.parts.known_flags import KnownFlag, known_flags

PAGE = Path(__file__).parents[1] / "docs" / "from_vllm.md"
BEGIN, END = "<!-- flags: made by tools/flags_table.py -->", "<!-- end of flags -->"


def flags_table() -> str:
    """The rows, as Markdown."""
    rows = [f"| {_names(flag)} | {_meaning(flag)} |" for flag in known_flags()]
    return "\n".join(["| flag | here |", "| --- | --- |", *rows])


def with_table(text: str) -> str:
    """The page with the rows as they are now."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{flags_table()}\n\n{END}{rest.partition(END)[2]}"


def _names(flag: KnownFlag) -> str:
    return ", ".join(f"`{name}`" for name in flag.spellings)


def _meaning(flag: KnownFlag) -> str:
    if flag.key:
        others = "; ".join(f"`{theirs}` is `{ours}`" for theirs, ours in flag.values.items())
        return f"works: `{flag.key}`" + (f" ({others})" if others else "")
    if flag.set:
        return f"works: `{flag.set}`"
    if flag.note:
        return f"accepted: {flag.note}"
    if flag.write:
        ways = flag.write.replace("{}", "VALUE").replace(" or ", "` or `")
        return f"write `{ways}`: {flag.says}"
    return f"not here: {flag.says}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
