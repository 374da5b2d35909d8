"""From messages to the text of a prompt: the checkpoint's Jinja template, or a plain one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

# For checkpoints that bring none. A base model continues it about as well as anything.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ChatTemplateError(Exception):
    """The template is broken, or refuses these messages; the message says why."""


class ChatTemplate:
    """A compiled template. It comes with the checkpoint and runs sandboxed: data, not code of ours."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.is_plain = source is None
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._template, variables = _compile(source if source is not None else PLAIN_TEMPLATE)
        self.uses_tools = "tools" in variables

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
        variables: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **(extra or {})}
        if tools:
            variables["tools"] = [dict(tool) for tool in tools]
        variables["messages"] = [dict(message) for message in messages]
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            text: str = self._template.render(variables)
        except Exception as error:  # templates are programs: any error in one is about these messages
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        if continue_final_message:
            return _cut_after(text, str(messages[-1].get("content") or ""))
        return text


def _cut_after(text: str, final_content: str) -> str:
    # The template closes the last message; to continue it, everything after its content goes.
    content = final_content.strip()
    place = text.rfind(content)
    if not content or place < 0:
        raise ChatTemplateError("continue_final_message needs a final message that the chat template writes out whole")
    return text[: place + len(content)]


def _compile(source: str) -> tuple[Any, set[str]]:
    """The template, and the variables it reads without setting them."""
    # Jinja takes 60 ms to import: inside, so that a tokenizer loaded on a thread pays for it there.
    import jinja2
    import jinja2.ext
    import jinja2.meta
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
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source), jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template has a mistake in line {error.lineno}: {error}") from error


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would corrupt prompts.
    import json

    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


