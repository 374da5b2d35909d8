"""What a completion must match: from a request's fields to a grammar that ranks can follow, compiled once to try it."""

from __future__ import annotations

import asyncio
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_medha.core.ports import EngineFacts
from megatron_medha.grammar.grammar_process import CompileRequest, ConstraintKind, GrammarCombination, GrammarVocabulary
from megatron_medha.grammar.grammar_trials import CompileLimitExceeded, CompilerBusy, GrammarProcessPool
from megatron_medha.grammar.guidance import GrammarError
from megatron_medha.server.bodies.openai_types import ResponseFormat, SharedFields, StructuredOutputs
from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.system.secret_values import child_environment
from megatron_medha.text.tokenizer import Tokenizer

_NUM_KNOWN = 256     # guides whose fate is known
_REFUSED_S = 60.0    # how long one that took too long is refused at once: clients that send it again get it again
_MAX_ERROR_CHARS = 1000
_MAX_SCHEMA_CHARS = 65_536  # of a JSON schema, and of all tools together; OpenAI allows 120,000
_MAX_REGEX_CHARS = 4_096    # of a regex or a grammar: hostile ones of 8 KiB take seconds to compile
_KINDS = {
    "json": ConstraintKind.JSON_SCHEMA, "regex": ConstraintKind.REGEX, "choice": ConstraintKind.CHOICE,
    "grammar": ConstraintKind.GRAMMAR,
}  # fmt: skip
_TOOL = re.compile(r"#/\$defs/tool([0-9]+)")


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """What a completion must match, and the field that says so."""

    kind: ConstraintKind
    text: str
    param: str


def constraint_of(fields: SharedFields) -> OutputConstraint | None:
    """What the fields of a request say; ApiError 400 where they say several things, or one we cannot do."""
    guides = [
        *_of_format(fields.response_format),
        *_of_structured(fields.structured_outputs),
        *_each(fields, "guided_", "guided_"),
    ]
    if len(guides) > 1:
        params = " and ".join(guide.param for guide in guides)
        raise bad_request(f"{params}: an answer can match one of them only", guides[1].param)
    return guides[0] if guides else None


def json_constraint(schema: dict[str, Any] | bool, param: str) -> OutputConstraint:
    """Text that is JSON of this schema."""
    return OutputConstraint(ConstraintKind.JSON_SCHEMA, msgspec.json.encode(schema).decode(), param)


def check_constrainable(fields: SharedFields, facts: EngineFacts, param: str) -> None:
    """ApiError 400 for fields that contradict a guide: it says by itself where a completion ends."""
    if fields.ignore_eos:
        raise bad_request(f"ignore_eos: not together with {param}, which says where the answer ends", "ignore_eos")
    if fields.min_tokens:
        raise bad_request(f"min_tokens: not together with {param}, which says where the answer ends", "min_tokens")
    if not facts.stop_token_ids:
        raise bad_request(f"{param}: this model has no end token, with which to end an answer that is complete", param)


@dataclass(frozen=True, slots=True)
class _CachedResult:
    """What is known of a guide."""

    grammar: str | None
    why: str = ""              # there is none
    code: str = ""
    until_s: float = math.inf  # of the loop's clock; after that it is tried again


class GrammarCache:
    """Turns guides into grammars. What came of a guide is remembered, and asked once for all who want it at a time."""

    def __init__(self) -> None:
        self._trials: GrammarProcessPool | None = None
        self._known: OrderedDict[OutputConstraint, _CachedResult] = OrderedDict()
        self._in_progress: dict[OutputConstraint, asyncio.Task[_CachedResult]] = {}

    async def grammar_of(
        self, guide: OutputConstraint, facts: EngineFacts, tokenizer: Tokenizer, config: ServerConfig, client: str = ""
    ) -> str:
        """For Sampling.grammar; ApiError 400 with the library's message where it cannot be compiled in time.

        client: in whose share of the processes it is compiled.
        """
        _check_size(guide)
        verdict = self._known.get(guide)
        if verdict is None or verdict.until_s < asyncio.get_running_loop().time():
            task = self._in_progress.get(guide)
            if task is None:
                trials = self._trials_for(facts, tokenizer, config)
                task = self._in_progress[guide] = asyncio.create_task(self._compile(guide, trials, config, client))
            try:
                verdict = await asyncio.shield(task)
            except CompilerBusy as error:
                wait_s = config.retry_after_s
                raise ApiError(503, str(error), code="grammars_waiting", retry_after_s=wait_s) from None
        else:
            self._known.move_to_end(guide)
        if verdict.grammar is None:
            # Schemas of several tools are compiled as one; see tool_fields.py.
            why = _TOOL.sub(r"tools[\1].function.parameters", verdict.why) if guide.param == "tools" else verdict.why
            raise bad_request(f"{guide.param}: {why}", guide.param, verdict.code)
        return verdict.grammar

    async def close(self) -> None:
        """No more will be asked for."""
        if self._trials is not None:
            await self._trials.close()
            await asyncio.gather(*self._in_progress.values(), return_exceptions=True)

    def _trials_for(self, facts: EngineFacts, tokenizer: Tokenizer, config: ServerConfig) -> GrammarProcessPool:
        if self._trials is None:
            self._trials = GrammarProcessPool(
                lambda: GrammarVocabulary(tokenizer.as_json(), facts.shape.vocab_size, facts.stop_token_ids),
                child_environment([secret for secret in (config.api_key, config.admin_key) if secret is not None]),
            )
        return self._trials

    async def _compile(
        self, guide: OutputConstraint, trials: GrammarProcessPool, config: ServerConfig, client: str
    ) -> _CachedResult:
        request = CompileRequest(guide.kind, guide.text)
        try:
            result = _CachedResult(await trials.compile(request, config.grammar_timeout_s, client))
        except CompileLimitExceeded as error:
            until_s = asyncio.get_running_loop().time() + _REFUSED_S
            result = _CachedResult(None, f"{error}; make it smaller or simpler", "grammar_too_complex", until_s)
        except GrammarError as error:
            result = _CachedResult(None, str(error)[:_MAX_ERROR_CHARS], "invalid_grammar")
        finally:
            del self._in_progress[guide]
        self._known[guide] = result
        self._known.move_to_end(guide)
        if len(self._known) > _NUM_KNOWN:
            self._known.popitem(last=False)
        return result


def _of_format(given: ResponseFormat | None) -> Iterator[OutputConstraint]:
    match given:
        case None | ResponseFormat(type="text"):
            return
        case ResponseFormat(type="json_object" | "json_schema"):
            # OpenAI's place for the schema, or that of llama.cpp, Together and Fireworks.
            schema = given.schema if given.json_schema is None else given.json_schema.schema
            if schema is None and given.type == "json_schema":
                raise bad_request(
                    "response_format.json_schema.schema: missing", "response_format.json_schema.schema"
                )
            yield json_constraint({"type": "object"} if schema is None else schema, "response_format")
        case _:
            raise bad_request(
                f"response_format.type: expected text, json_object or json_schema, got `{given.type[:40]}`",
                "response_format.type",
            )


def _of_structured(given: StructuredOutputs | None) -> Iterator[OutputConstraint]:
    if given is None:
        return
    name = "structured_outputs"
    if given.structural_tag is not None:
        raise bad_request(f"{name}.structural_tag: not supported", name, "unsupported_parameter")
    if given.json_object:
        yield json_constraint({"type": "object"}, f"{name}.json_object")
    yield from _each(given, "", f"{name}.")


def _each(owner: object, prefix: str, path: str) -> Iterator[OutputConstraint]:
    for name, kind in _KINDS.items():
        given, param = getattr(owner, prefix + name), path + name
        if given is None:
            continue
        if name == "choice":
            if not given or not all(given):
                raise bad_request(f"{param}: expected at least one text, none of them empty", param)
            given = "start: " + " | ".join(msgspec.json.encode(text).decode() for text in given)
        yield OutputConstraint(kind, given, param) if isinstance(given, str) else json_constraint(given, param)


def _check_size(guide: OutputConstraint) -> None:
    if guide.kind is ConstraintKind.COMBINATION:
        parts = msgspec.json.decode(guide.text, type=GrammarCombination).parts
        for name, part in parts.items():
            _check_size(OutputConstraint(part.kind, part.text, guide.param if name == "text" else "tools"))
        return
    is_regex = guide.kind in (ConstraintKind.REGEX, ConstraintKind.GRAMMAR)
    most = _MAX_REGEX_CHARS if is_regex else _MAX_SCHEMA_CHARS
    if len(guide.text) > most:
        raise bad_request(
            f"{guide.param}: {len(guide.text)} characters, at most {most}", guide.param, "grammar_too_complex"
        )
    if guide.kind is not ConstraintKind.JSON_SCHEMA:
        return
    try:
        schema = msgspec.json.decode(guide.text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"{guide.param}: not valid JSON: {error}", guide.param, "invalid_grammar") from None
    if not isinstance(schema, dict | bool):
        raise bad_request(f"{guide.param}: a JSON schema is an object", guide.param, "invalid_grammar")
    if any(len(text) > _MAX_REGEX_CHARS for text in _patterns(schema)):
        raise bad_request(
            f"{guide.param}: a pattern has more than {_MAX_REGEX_CHARS} characters", guide.param, "grammar_too_complex"
        )


def _patterns(schema: Any) -> Iterator[str]:
    """Texts that a schema may use as regexes."""
    rest = [schema]
    while rest:
        match rest.pop():
            case dict() as object_:
                if isinstance(pattern := object_.get("pattern"), str):
                    yield pattern
                if isinstance(patterns := object_.get("patternProperties"), dict):
                    yield from patterns
                rest.extend(object_.values())
            case list() as array_:
                rest.extend(array_)
            case _:
                pass
