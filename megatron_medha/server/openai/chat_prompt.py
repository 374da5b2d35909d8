"""From the messages of a chat to the text of its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megatron_medha.server.bodies.openai_types import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    SharedFields,
    TokenizeRequest,
    Tool,
    ToolChoice,
)
from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.service import ReadyState, Service
from megatron_medha.server.tools.json_text import read_cut_object
from megatron_medha.server.tools.tool_description import SYSTEM_ROLES, with_description
from megatron_medha.server.tools.tool_fields import MAX_TOOLS, ToolUse, syntax_of, too_many_tools, tool_use
from megatron_medha.text.chat.call_syntax import ToolSyntax
from megatron_medha.text.chat.chat_template import ChatTemplateError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")

# As far as time goes, a message is worth so many characters of text, however empty it is.
CHARS_PER_MESSAGE = 50


@dataclass(slots=True)
class ConversationHistory:
    """The chat that a request of another route is, where its parts came from, and what is left out of it."""

    messages: list[ChatMessage] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)  # of a chat's fields, in the words of the route
    ignored: list[str] = field(default_factory=list)

    def add(self, message: ChatMessage, path: str) -> None:
        """Add a message that came from there."""
        self.paths[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def add_tool(self, function: FunctionDefinition, path: str) -> None:
        """Add a tool that came from there; ApiError 400 for one too many."""
        if len(self.tools) == MAX_TOOLS:
            raise too_many_tools()
        self.paths[f"tools[{len(self.tools)}].function"] = path
        self.tools.append(Tool(type="function", function=function))

    def request(self, body: SharedFields, **fields: Any) -> ChatRequest:
        """The chat's request, with the fields that all routes share and these."""
        shared = {name: getattr(body, name) for name in SharedFields.__struct_fields__}
        return ChatRequest(**shared, messages=self.messages, tools=self.tools or None, **fields)

    @contextmanager
    def renamed_errors(self, paths: Mapping[str, str]) -> Iterator[None]:
        """An ApiError names the field as the client does. paths: of fields other than messages and tools."""
        try:
            yield
        except ApiError as error:
            error.rename_field({**paths, **self.paths})
            raise


def not_text(where: str, expected: str, kind: str, param: str) -> ApiError:
    """A 400 for a part of a message that is no text."""
    return bad_request(
        f"{where}: this server reads text alone; expected {expected} with its text, got `{kind[:40]}`", param,
        "unsupported_content",
    )  # fmt: skip


def chat_tools(
    service: Service,
    ready: ReadyState,
    tools: Sequence[Tool] | None,
    choice: ToolChoice | str | None,
    is_parallel: bool | None,
) -> ToolUse | None:
    """How a response may call tools, with this model; ApiError 400 for what does not fit."""
    syntax = syntax_of(service.config.tool_call_parser, ready.tokenizer.template)
    return tool_use(tools, choice, is_parallel=is_parallel, syntax=syntax or ToolSyntax.HERMES)


async def render_messages(
    service: Service,
    ready: ReadyState,
    messages: list[ChatMessage],
    fields: ChatRequest | TokenizeRequest,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, tuple[str, ...]]:
    """The prompt, and the fields that are not in it; ApiError 400 for messages that the template refuses, or none."""
    if fields.chat_template is not None:
        # Templates are programs, and a client's could loop for ever.
        raise bad_request("chat_template: only the checkpoint's own", "chat_template", "unsupported_parameter")
    continues = bool(fields.continue_final_message)
    adds_prompt = fields.add_generation_prompt
    if continues and adds_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    if not messages:
        raise bad_request("messages: expected at least one message, got an empty list", "messages")
    limit = ready.facts.max_request_tokens
    if len(messages) > limit:
        raise bad_request(
            f"messages: {len(messages)} of them cannot fit the {limit} tokens that prompt and output together may have",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    extra = dict(fields.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        if name in extra:
            param = f"chat_template_kwargs.{name}"
            raise bad_request(f"{param}: send it as a field of the request, {name}", param)
    if fields.documents and not ready.tokenizer.template.uses_documents:
        raise bad_request(
            "documents: this model's chat template has no place for them; put their text into a message", "documents",
            "unsupported_parameter",
        )  # fmt: skip
    for name in ("documents", "reasoning_effort"):
        if (value := getattr(fields, name)) is not None:
            extra.setdefault(name, value)

    template = ready.tokenizer.template
    describes = bool(tools) and syntax_of(service.config.tool_call_parser, template) is None

    def plain() -> Iterable[dict[str, Any]]:
        made = (_plain_message(place, message) for place, message in enumerate(messages))
        return with_description(made, tools) if describes else made

    options = {
        "add_generation_prompt": not continues and adds_prompt is not False,
        "continue_final_message": continues,
        "tools": () if describes else tuple(tools),
        "extra": extra,
    }
    num_chars = len(msgspec.json.encode(extra)) + sum(map(_num_chars, messages))
    try:
        return await service.text.render(template, plain(), options, num_chars), ()
    except ChatTemplateError as error:
        refusal = error
    if fields.reasoning_effort is not None and template.uses_reasoning_effort:
        # Clients send one of OpenAI's efforts always; some templates refuse those that their model has not learned.
        options["extra"] = {name: value for name, value in extra.items() if name != "reasoning_effort"}
        with suppress(ChatTemplateError):
            return await service.text.render(template, plain(), options, num_chars), ("reasoning_effort",)
    num_added = describes and messages[0].role not in SYSTEM_ROLES
    place = None if refusal.place is None else refusal.place - num_added
    param = "messages" if place is None or place < 0 else f"messages[{place}]"
    raise bad_request(f"{param}: {refusal}", param)


def _num_chars(message: ChatMessage) -> int:
    content = message.content
    parts = sum(len(part.text or "") + CHARS_PER_MESSAGE for part in content) if isinstance(content, list) else 0
    calls = sum(len(call.arguments) + CHARS_PER_MESSAGE for call in message.tool_calls or ())
    content_chars = len(content) if isinstance(content, str) else parts
    return CHARS_PER_MESSAGE + content_chars + calls + len(message.reasoning_content or "")


def adds_special_tokens(ready: ReadyState, asked: bool | None) -> bool:
    """Whether the tokenizer adds its special tokens to a rendered chat."""
    # A checkpoint's template writes its own; the plain one leaves them to the tokenizer.
    return ready.tokenizer.template.is_plain if asked is None else asked


def _plain_message(place: int, message: ChatMessage) -> dict[str, Any]:
    param = f"messages[{place}]"
    if message.role not in ROLES:
        raise bad_request(f"{param}.role: expected one of {', '.join(ROLES)}", f"{param}.role")
    content = message.content
    if isinstance(content, list):
        content = "\n".join(
            _text_of_part(part, f"{param}.content", index)
            for index, part in enumerate(content)
            # Models do not read the reasoning of earlier turns.
            if message.role != "assistant" or part.type not in _REASONING_PARTS
        )
    if content is None and message.role == "assistant" and not message.tool_calls:
        content = message.refusal or ""
    if content is None and message.role in ("tool", "function"):
        content = ""  # it returned nothing
    if content is None and message.role != "assistant":
        raise bad_request(f"{param}.content: expected text, got none", f"{param}.content")
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain["content"] = content
    for index, call in enumerate(message.tool_calls or ()):
        # Templates write arguments as JSON themselves, so they get them read. A response's may have been cut.
        plain["tool_calls"][index]["function"]["arguments"] = read_cut_object(call.arguments)
    if not message.tool_calls:
        plain.pop("tool_calls", None)  # templates look whether it is there
    return plain


def _text_of_part(part: ContentPart, param: str, index: int) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal") or text is None:
        raise not_text(f"{param}[{index}]", "a part of type `text`", part.type, param)
    return text
