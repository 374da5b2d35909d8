"""From messages to the text of a prompt: the checkpoint's Jinja template, or a plain one.

A template is a program that comes with the checkpoint, and may loop for ever or ask for all memory there is. Parsing is
safe. Compiling is not, since Jinja computes constants then, nor is rendering: the server does both in another process
(template_process.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

# For checkpoints that bring none. A base model continues it about as well as anything.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_MAX_TEMPLATE_CHARS = 2**18  # the longest known have 30,000; a longer one would take seconds to parse


class ChatTemplateError(Exception):
    """The template is broken, or refuses these messages; the message says why."""

    def __init__(self, why: str, place: int | None = None) -> None:
        super().__init__(why)
        self.place = place  # of the message that is at fault, where it is one


class ChatTemplate:
    """A template. It comes with the checkpoint and runs sandboxed: data, not code of ours."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """Parses it. Raises ChatTemplateError if it is no template."""
        self.is_plain = source is None
        self.source = source
        self.special_tokens = dict(special_tokens)
        names = _names_read(source if source is not None else PLAIN_TEMPLATE)
        self.uses_tools = "tools" in names
        self.uses_documents = "documents" in names
        self.uses_reasoning_effort = "reasoning_effort" in names
        self._template: Any = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text; ChatTemplateError if the template refuses the messages."""
        variables: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **(extra or {})}
        if tools:
            variables["tools"] = [dict(tool) for tool in tools]
        if continue_final_message and messages[-1].get("tool_calls"):
            raise ChatTemplateError("continue_final_message needs a final message without calls", len(messages) - 1)
        # The template closes the last message. What continues it begins at the mark, and all after that goes.
        mark = f"end{secrets.token_hex(16)}" if continue_final_message else ""
        variables["messages"] = [*map(dict, messages[:-1]), *(_with_mark(one, mark) for one in messages[-1:])]
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            if self._template is None:
                self._template = _environment().from_string(PLAIN_TEMPLATE if self.source is None else self.source)
            text: str = self._template.render(variables)
        except Exception as error:  # templates are programs: any error in one is about these messages
            what = "it uses too much memory" if isinstance(error, MemoryError) else error
            raise ChatTemplateError(f"the chat template refuses these messages: {what}") from error
        if not mark:
            return text
        place = text.rfind(mark)
        if place < 0:
            raise ChatTemplateError(
                "continue_final_message needs a final message that the chat template writes out whole",
                len(messages) - 1,
            )
        return text[:place]


def _with_mark(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    content = message.get("content")
    if not mark:
        return dict(message)
    if isinstance(content, list):
        *parts, last = content or [{"type": "text", "text": ""}]
        return {**message, "content": [*parts, {**last, "text": f"{last.get('text') or ''}{mark}"}]}
    return {**message, "content": f"{content or ''}{mark}"}


def _names_read(source: str) -> frozenset[str]:
    """The variables that the template reads."""
    import jinja2.exceptions
    import jinja2.nodes

    if len(source) > _MAX_TEMPLATE_CHARS:
        raise ChatTemplateError(f"the chat template has {len(source)} characters, more than {_MAX_TEMPLATE_CHARS}")
    try:
        # Not jinja2.meta, which computes constants as the compiler does.
        names = _environment().parse(source).find_all(jinja2.nodes.Name)
        return frozenset(one.name for one in names if one.ctx == "load")
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template has a mistake in line {error.lineno}: {error}") from error
    except RecursionError:
        raise ChatTemplateError("the chat template is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ChatTemplateError(f"the chat template cannot be read: {error}") from None


def _environment() -> Any:
    # Jinja takes 60 ms to import: inside, so that a tokenizer loaded on a thread pays for it there.
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """{% generation %} marks text for training; here it is plain text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would corrupt prompts.
    import json

    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

