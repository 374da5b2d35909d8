"""What an answer must match: from a request's fields to a grammar that ranks can follow, compiled once to try it."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_medha.engine.guidance import GrammarCompiler, GrammarError
from megatron_medha.server.config import ServerConfig
from megatron_medha.server.errors import ApiError, bad_request
from megatron_medha.server.openai_types import ResponseFormat, SharedFields, StructuredOutputs

if TYPE_CHECKING:
    from megatron_medha.server.service import Ready

# As json.dumps writes it. Were whitespace free, a weak model could go on with blanks until its tokens run out.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NUM_KNOWN = 256      # grammars known to compile
_QUEUE_S = 10.0       # for the grammars of others; each takes server.grammar_timeout_s, hostile ones a few times that
_MAX_ERROR_CHARS = 500


class GuideKind(Enum):
    """How a guide is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"    # Lark, written here
    GRAMMAR = "grammar"  # Lark, or GBNF as llama.cpp has it


@dataclass(frozen=True, slots=True)
class Guide:
    """What an answer must match, and the field that says so."""

    kind: GuideKind
    text: str
    param: str


def guide_of(fields: SharedFields) -> Guide | None:
    """What the fields of a request say; ApiError 400 where they say several things, or one we cannot do."""
    guides = [*_of_format(fields.response_format), *_of_structured(fields.structured_outputs), *_of_old_names(fields)]
    if len(guides) > 1:
        params = " and ".join(guide.param for guide in guides)
        raise bad_request(f"{params}: an answer can match one of them only", guides[1].param)
    return guides[0] if guides else None


def json_guide(schema: dict[str, Any] | bool, param: str) -> Guide:
    """Text that is JSON of this schema."""
    return Guide(GuideKind.JSON_SCHEMA, msgspec.json.encode(schema).decode(), param)


def check_guidable(fields: SharedFields, ready: Ready, param: str) -> None:
    """ApiError 400 for fields that contradict a guide: it says by itself where an answer ends."""
    if fields.ignore_eos:
        raise bad_request(f"ignore_eos: not together with {param}, which says where the answer ends", "ignore_eos")
    if fields.min_tokens:
        raise bad_request(f"min_tokens: not together with {param}, which says where the answer ends", "min_tokens")
    if not ready.facts.stop_token_ids:
        raise bad_request(f"{param}: this model has no end token, with which to end an answer that is complete", param)


class Grammars:
    """Turns guides into grammars. Compiling one is work for a thread, and bounded in time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._compiler: GrammarCompiler | None = None
        self._known: OrderedDict[Guide, str] = OrderedDict()

    async def grammar_of(self, guide: Guide, ready: Ready, config: ServerConfig) -> str:
        """For Sampling.grammar; ApiError 400 with the library's message where it cannot be compiled in time."""
        if (known := self._known.get(guide)) is not None:
            self._known.move_to_end(guide)
            return known
        _check_size(guide, config)
        loop = asyncio.get_running_loop()
        has_begun: asyncio.Future[None] = loop.create_future()

        def work() -> str:
            try:
                compiler = self._compiler_for(ready)
            finally:
                loop.call_soon_threadsafe(lambda: has_begun.done() or has_begun.set_result(None))
            grammar = _written_out(guide)
            compiler.matcher(grammar)
            return grammar

        done = loop.run_in_executor(self._thread, work)
        try:
            async with asyncio.timeout(_QUEUE_S):
                await has_begun
        except TimeoutError:
            done.cancel()
            raise ApiError(503, "too many grammars are being compiled", code="grammars_waiting",
                           headers={"retry-after": str(config.retry_after_s)}) from None  # fmt: skip
        try:
            async with asyncio.timeout(config.grammar_timeout_s):
                grammar = await asyncio.shield(done)
        except TimeoutError:
            done.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody asks any more
            raise bad_request(
                f"{guide.param}: not compiled within {config.grammar_timeout_s:g} s; make it smaller or simpler",
                guide.param, "grammar_too_complex",
            ) from None  # fmt: skip
        except GrammarError as error:
            why = str(error)[:_MAX_ERROR_CHARS]
            raise bad_request(f"{guide.param}: {why}", guide.param, "invalid_grammar") from None
        self._known[guide] = grammar
        if len(self._known) > _NUM_KNOWN:
            self._known.popitem(last=False)
        return grammar

    def close(self) -> None:
        """No more will be asked for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compiler_for(self, ready: Ready) -> GrammarCompiler:
        if self._compiler is None:
            facts = ready.facts
            self._compiler = GrammarCompiler(ready.tokenizer.as_json(), facts.shape.vocab_size, facts.stop_token_ids)
        return self._compiler


def _written_out(guide: Guide) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            try:
                grammar: str = LLMatcher.grammar_from_json_schema(guide.text, _JSON_STYLE)
            except ValueError as error:
                raise GrammarError(str(error)) from None
        case GuideKind.CHOICE:
            grammar = LLMatcher.grammar_from_lark(guide.text)
        case GuideKind.REGEX:
            grammar = LLMatcher.grammar_from_regex(guide.text)
        case GuideKind.GRAMMAR:
            try:
                lark = any_to_lark(guide.text)
            except Exception as error:  # a parser in Python, with errors of every kind
                raise GrammarError(f"neither Lark nor GBNF: {error}") from None
            grammar = LLMatcher.grammar_from_lark(lark)
    return grammar


def _of_format(given: ResponseFormat | None) -> Iterator[Guide]:
    match given:
        case None | ResponseFormat(type="text"):
            return
        case ResponseFormat(type="json_object"):
            yield json_guide({"type": "object"}, "response_format")
        case ResponseFormat(type="json_schema"):
            if given.json_schema is None or given.json_schema.schema is None:
                raise bad_request(
                    "response_format.json_schema.schema: missing", "response_format.json_schema.schema"
                )
            yield json_guide(given.json_schema.schema, "response_format")
        case _:
            raise bad_request(
                f"response_format.type: expected text, json_object or json_schema, got `{given.type[:40]}`",
                "response_format.type",
            )


def _of_structured(given: StructuredOutputs | None) -> Iterator[Guide]:
    if given is None:
        return
    name = "structured_outputs"
    if given.structural_tag is not None:
        raise bad_request(f"{name}.structural_tag: not supported", name, "unsupported_parameter")
    if given.json_object:
        yield json_guide({"type": "object"}, f"{name}.json_object")
    yield from _each(name + ".", given.json, given.regex, given.choice, given.grammar)


def _of_old_names(fields: SharedFields) -> Iterator[Guide]:
    given = (fields.guided_json, fields.guided_regex, fields.guided_choice, fields.guided_grammar)
    yield from _each("guided_", *given)


def _each(
    prefix: str,
    schema: dict[str, Any] | str | bool | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> Iterator[Guide]:
    if schema is not None:
        param = f"{prefix}json"
        yield Guide(GuideKind.JSON_SCHEMA, schema, param) if isinstance(schema, str) else json_guide(schema, param)
    if regex is not None:
        yield Guide(GuideKind.REGEX, regex, f"{prefix}regex")
    if choice is not None:
        if not choice or not all(choice):
            raise bad_request(f"{prefix}choice: expected at least one text, none of them empty", f"{prefix}choice")
        lark = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)
        yield Guide(GuideKind.CHOICE, lark, f"{prefix}choice")
    if grammar is not None:
        yield Guide(GuideKind.GRAMMAR, grammar, f"{prefix}grammar")


def _check_size(guide: Guide, config: ServerConfig) -> None:
    is_regex = guide.kind in (GuideKind.REGEX, GuideKind.GRAMMAR)
    key = "max_regex_chars" if is_regex else "max_schema_chars"
    most: int = getattr(config, key)
    if len(guide.text) > most:
        raise bad_request(
            f"{guide.param}: {len(guide.text)} characters, at most {most} (server.{key})", guide.param,
            "grammar_too_complex",
        )  # fmt: skip
    if guide.kind is not GuideKind.JSON_SCHEMA:
        return
    try:
        schema = msgspec.json.decode(guide.text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"{guide.param}: not valid JSON: {error}", guide.param, "invalid_grammar") from None
    if not isinstance(schema, dict | bool):
        raise bad_request(f"{guide.param}: a JSON schema is an object", guide.param, "invalid_grammar")
    if any(len(text) > config.max_regex_chars for text in _patterns(schema)):
        raise bad_request(
            f"{guide.param}: a pattern has more than {config.max_regex_chars} characters (server.max_regex_chars)",
            guide.param, "grammar_too_complex",
        )  # fmt: skip


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
