"""The grammar of a completion that is text of a given form, or calls of tools in the model's own syntax."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import msgspec

from megatron_medha.grammar.grammar_process import CompileRequest, ConstraintKind, GrammarCombination
from megatron_medha.server.tools.structured_output import OutputConstraint
from megatron_medha.server.tools.tool_fields import MAX_REQUIRED_CALLS, ToolUse, call_schema
from megatron_medha.text.chat.call_syntax import MARKS, ToolSyntax

# Each call has tags of its own. Of the other syntaxes with marks, one section holds a list of calls.
_TAGGED_ONE_BY_ONE = (ToolSyntax.HERMES, ToolSyntax.QWEN_XML, ToolSyntax.SEED, ToolSyntax.GLM)


def calls_or_text(use: ToolUse, text: OutputConstraint, token_id_of: Callable[[str], int | None]) -> ToolUse:
    """The same use of tools where a completion without calls has to match `text`.

    token_id_of: finds the token that a mark is, if it is one.
    """
    key = "parameters" if use.syntax is ToolSyntax.LLAMA3_JSON else "arguments"
    combination = GrammarCombination(
        lark=f"start: calls | @text\n{_lark_of_calls(use, token_id_of)}",
        parts={
            "call": CompileRequest(ConstraintKind.JSON_SCHEMA, json.dumps(call_schema(use.definitions, key))),
            "text": CompileRequest(text.kind, text.text),
        },
    )
    return replace(
        use, guide=OutputConstraint(ConstraintKind.COMBINATION, msgspec.json.encode(combination).decode(), text.param)
    )


def _lark_of_calls(use: ToolUse, token_id_of: Callable[[str], int | None]) -> str:
    marks = MARKS[use.syntax]

    def several(one: str, between: str) -> str:
        return f'{one} ("{between}" {one}){{0,{MAX_REQUIRED_CALLS - 1}}}' if use.is_parallel else one

    def mark(text: str) -> str:
        token_id, literal = token_id_of(text), json.dumps(text, ensure_ascii=False)
        return literal if token_id is None else f"(<[{token_id}]> | {literal})"

    if use.syntax is ToolSyntax.LLAMA3_JSON:
        return "calls: " + several("@call", "; ")
    calls = f'"[" {several("@call", ", ")} "]"'
    if marks.is_bare:
        return f"calls: {calls}"
    opening, closing = mark(marks.openings[0]), mark(marks.closings[0]) if marks.closings else ""
    if use.syntax in _TAGGED_ONE_BY_ONE:
        lines = several("one", r"\n")
        return f'calls: {lines}\none: {opening} "\\n" @call "\\n" {closing}'
    return f"calls: {opening} {calls} {closing}"
