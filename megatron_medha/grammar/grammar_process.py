"""The program that compiles grammars in a process of its own, so that one that does not end can be ended.

The library's limits do not hold everywhere: a schema of 1 KB that wants eighteen patterns at once (allOf) keeps it busy
for hours without a look at its fuel. A thread that compiles it can neither be stopped nor left behind.

Both sides write lines of JSON: first a GrammarVocabulary, then CompileRequests; each gets a CompileResult.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_medha.grammar.guidance import GrammarCompiler, GrammarError
from megatron_medha.grammar.json_schema import translated
from megatron_medha.system.libc import set_pdeathsig

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

COMMAND = ("-m", "megatron_medha.grammar.grammar_process")

# Beyond that an allocation fails and the process ends; a vocabulary of 150,000 takes 0.1 GiB, a grammar less.
_MAX_MEMORY_BYTES = 4 * 2**30
# As json.dumps writes it. Were whitespace free, a weak model could go on with blanks until its tokens run out.
_JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ConstraintKind(Enum):
    """How a guide is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"    # Lark, written here
    GRAMMAR = "grammar"  # Lark, or GBNF as llama.cpp has it
    COMBINATION = "combination"  # a GrammarCombination as JSON


class GrammarVocabulary(msgspec.Struct, frozen=True):
    """What grammars are compiled for; see GrammarCompiler."""

    tokenizer_json: str
    vocab_size: int
    stop_token_ids: tuple[int, ...]


class CompileRequest(msgspec.Struct, frozen=True):
    """A guide, as a client wrote it."""

    kind: ConstraintKind
    text: str


class GrammarCombination(msgspec.Struct, frozen=True):
    """A grammar in Lark, written here, that names others: `@text` is the part "text"."""

    lark: str
    parts: dict[str, CompileRequest]


class CompileResult(msgspec.Struct, frozen=True):
    """What came of it."""

    grammar: str = ""         # for GrammarCompiler.matcher
    error: str | None = None  # why there is none


def main() -> None:
    """Compile what comes in until nothing more does."""
    set_pdeathsig(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no result
    compiler: GrammarCompiler | None = None
    for line in sys.stdin.buffer:
        try:
            if compiler is None:
                given = msgspec.json.decode(line, type=GrammarVocabulary)
                compiler = GrammarCompiler(given.tokenizer_json, given.vocab_size, given.stop_token_ids)
                tried = CompileResult()
            else:
                tried = CompileResult(_compiled(compiler, msgspec.json.decode(line, type=CompileRequest)))
        except GrammarError as error:
            tried = CompileResult(error=str(error))
        results.write(msgspec.json.encode(tried) + b"\n")
        results.flush()


def _compiled(compiler: GrammarCompiler, trial: CompileRequest) -> str:
    grammar = _written_out(trial)
    compiler.compile(grammar)
    return grammar


def _written_out(trial: CompileRequest) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match trial.kind:
        case ConstraintKind.JSON_SCHEMA:
            try:
                grammar: str = LLMatcher.grammar_from_json_schema(translated(trial.text), _JSON_STYLE)
            except ValueError as error:
                raise GrammarError(str(error)) from None
        case ConstraintKind.CHOICE:
            grammar = LLMatcher.grammar_from_lark(trial.text)
        case ConstraintKind.COMBINATION:
            given = msgspec.json.decode(trial.text, type=GrammarCombination)
            parts = [_as_part(name, _written_out(part)) for name, part in given.parts.items()]
            grammar = json.dumps({"grammars": [{"lark_grammar": given.lark}, *parts]})
        case ConstraintKind.REGEX:
            grammar = LLMatcher.grammar_from_regex(trial.text)
        case ConstraintKind.GRAMMAR:
            try:
                lark = any_to_lark(trial.text)
            except Exception as error:  # a parser in Python, with errors of every kind
                raise GrammarError(f"neither Lark nor GBNF: {error}") from None
            grammar = LLMatcher.grammar_from_lark(lark)
    return grammar


def _as_part(name: str, grammar: str) -> dict[str, Any]:
    # The library writes JSON for schemas and regexes, and leaves Lark as it is.
    part: dict[str, Any] = {"lark_grammar": grammar}
    if grammar.startswith('{"grammars"'):
        (part,) = json.loads(grammar)["grammars"]
    return {**part, "name": name}


if __name__ == "__main__":
    main()
