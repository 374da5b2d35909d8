"""Rendering a chat so that no message is lost: templates pass over roles and shapes that they do not know.

After rendering, the text of every message must be in the prompt, in order. Where it is not, or where the template
refuses the messages, they are written in other ways that mean the same and rendered again.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from megatron_medha.text.chat.chat_template import ChatTemplate, ChatTemplateError

TemplateMessage = dict[str, Any]

# Text this short may stand in a prompt by chance, so the template is also tried with a word that cannot.
_SHORT_CHARS = 24
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
# Reasoning that begins an assistant's message; templates drop it from earlier turns.
_REASONING = re.compile(
    r"\s*(?:<(think|thinking|thought|reasoning|seed:think)>.*?</\1>|\[THINK\].*?\[/THINK\])", re.DOTALL
)
_SPELT_PARTS = ("{'type': 'text'", '{"type": "text"')  # a part, written out by Python or as JSON
_MAX_ARGUMENT_TEXTS = 1000  # of a call, that are looked for one by one


class WholeChat(NamedTuple):
    """A prompt with all messages in it."""

    text: str
    mapping: str  # how the messages were written otherwise than they came; empty: as they came


def render_whole(
    template: ChatTemplate, messages: Sequence[TemplateMessage], *, takes_parts: bool = False, **options: Any
) -> WholeChat:
    """The prompt's text. ChatTemplateError names the message that the template leaves out, or says why it refuses.

    takes_parts: what is tried first, contents as lists of parts. options: of ChatTemplate.render.
    """
    first_error: ChatTemplateError | None = None
    has_refused = False
    for as_parts in (takes_parts, not takes_parts):
        for mapping, mapped in _ways_to_write(messages):
            if mapping.endswith(_JOINED) and not has_refused:
                continue  # a template that leaves turns out would still do so in longer chats
            ways = [mapping] if mapping else []
            written = mapped
            if as_parts:
                written = [_in_parts(message) for message in mapped]
                ways.append("contents as parts")
            try:
                text = template.render(written, **options)
            except ChatTemplateError as error:
                first_error, has_refused = first_error or error, True
                continue
            place = _left_out(template, mapped, written, text, options)
            if as_parts and any(spelling in text for spelling in _SPELT_PARTS):
                continue  # it took the list for text
            if place is None:
                return WholeChat(text, "; ".join(ways))
            if first_error is None:
                role = mapped[place]["role"]
                first_error = ChatTemplateError(f"the chat template leaves out this message of role {role}", place)
    assert first_error is not None
    raise first_error


# ---- other ways to write the same ----


def _ways_to_write(messages: Sequence[TemplateMessage]) -> Iterator[tuple[str, Sequence[TemplateMessage]]]:
    """The messages as they are, then with one change after another, then with one of the last two as well."""
    yield "", messages
    ways: list[str] = []
    for name, step in _STEPS:
        if (changed := step(messages)) != messages:
            messages = changed
            ways.append(name)
            yield "; ".join(ways), messages
    yield from _last_ways(ways, messages)
    if (changed := _with_system_in_question(messages)) != messages:
        ways.append("system as part of the question")
        yield "; ".join(ways), changed
        yield from _last_ways(ways, changed)


def _last_ways(
    ways: Sequence[str], messages: Sequence[TemplateMessage]
) -> Iterator[tuple[str, Sequence[TemplateMessage]]]:
    for name, step in _LAST_STEPS:
        if (changed := step(messages)) != messages:
            yield "; ".join([*ways, name]), changed


def _with_common_roles(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    mapped: list[TemplateMessage] = []
    call_ids: dict[str | None, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            call_ids[call["function"]["name"]] = call_ids[None] = call["id"]
        match message["role"]:
            case "developer":
                mapped.append({**message, "role": "system"})
            case "function":
                call_id = call_ids.get(message.get("name"), call_ids.get(None))
                mapped.append({"tool_call_id": call_id, **message, "role": "tool"})
            case _:
                mapped.append(message)
    return mapped


def _with_one_system_message(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    system = [message for message in messages if message["role"] == "system"]
    if not system or (len(system) == 1 and messages[0]["role"] == "system"):
        return messages
    text = "\n\n".join(message["content"] for message in system)
    return [{"role": "system", "content": text}, *(one for one in messages if one["role"] != "system")]


def _with_system_in_question(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    """For templates that have no place for the system."""
    if [one["role"] for one in messages] == ["system"]:
        return [{**messages[0], "role": "user"}]
    if [one["role"] for one in messages[:2]] != ["system", "user"]:
        return messages
    system, question = messages[:2]
    return [{**question, "content": f"{system['content']}\n\n{question['content']}"}, *messages[2:]]


def _with_empty_contents(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    return [{**one, "content": ""} if one.get("content") is None else one for one in messages]


def _with_short_ids(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    """As Mistral's templates want them."""
    changed = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [{**call, "id": _short_id(call["id"])} for call in calls]}
        if (call_id := message.get("tool_call_id")) is not None:
            message = {**message, "tool_call_id": _short_id(call_id)}
        changed.append(message)
    return changed


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]


def _with_turns_joined(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    """For templates in which user and assistant must alternate."""
    joined: list[TemplateMessage] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is None or last["role"] != message["role"] or message["role"] not in ("user", "assistant") or (
            last.get("tool_calls")
        ):
            joined.append(message)
            continue
        texts = [text for one in (last, message) if (text := one.get("content"))]
        joined[-1] = {**message, "content": "\n\n".join(texts)}
    return joined


def _with_calls_as_text(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    """For templates that know no calls: written as Hermes models do, and results as the user's."""
    if not any(one.get("tool_calls") for one in messages):
        return messages  # a result alone belongs to no call
    changed: list[TemplateMessage] = []
    for message in messages:
        text = message.get("content") or ""
        role = message["role"]
        for call in message.get("tool_calls") or ():
            function = {name: call["function"][name] for name in ("name", "arguments")}
            written = json.dumps(function, ensure_ascii=False)
            text += f"{chr(10) if text else ''}<tool_call>\n{written}\n</tool_call>"
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        if changed and role != "system" and changed[-1]["role"] == role:  # turns must alternate
            changed[-1] = {"role": role, "content": f"{changed[-1]['content']}\n{text}"}
        else:
            changed.append({"role": role, "content": text})
    return changed


def _with_calls_apart(messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
    """Each call in a message of its own, without text, and its result behind it."""
    apart: list[TemplateMessage] = []
    placed: set[int] = set()  # results that stand behind their calls
    for place, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        if place in placed:
            continue
        if not calls or (len(calls) == 1 and not message.get("content")):
            apart.append(message)
            continue
        if message.get("content"):
            apart.append({name: value for name, value in message.items() if name != "tool_calls"})
        for call in calls:
            apart.append({**message, "content": "", "tool_calls": [call]})
            result = _place_of_result(messages, place, call["id"])
            if result is not None and len(calls) > 1:
                placed.add(result)
                apart.append(messages[result])
    return apart


def _place_of_result(messages: Sequence[TemplateMessage], place: int, call_id: str) -> int | None:
    for result in range(place + 1, len(messages)):
        if messages[result]["role"] != "tool":
            return None
        if messages[result].get("tool_call_id") == call_id:
            return result
    return None


def _in_parts(message: TemplateMessage) -> TemplateMessage:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}] if content else []}


_JOINED = "turns of one role as one"
_Rewrite = Callable[[Sequence[TemplateMessage]], Sequence[TemplateMessage]]
_STEPS: tuple[tuple[str, _Rewrite], ...] = (
    ("developer as system, function as tool", _with_common_roles),
    ("system messages as one", _with_one_system_message),
    ("no content as empty text", _with_empty_contents),
    ("calls with ids of nine characters", _with_short_ids),
)
_LAST_STEPS: tuple[tuple[str, _Rewrite], ...] = (
    (_JOINED, _with_turns_joined),
    ("calls in messages of their own", _with_calls_apart),
    ("calls and results as text", _with_calls_as_text),
)


# ---- what is in the prompt ----


def _left_out(
    template: ChatTemplate,
    messages: Sequence[TemplateMessage],
    written: Sequence[TemplateMessage],
    text: str,
    options: Mapping[str, Any],
) -> int | None:
    """The place of the first message that the prompt does not hold; None if it holds all."""
    place = _first_missing(messages, text)
    if place is not None:
        # Templates may indent and wrap text: so without any white space, before it counts as lost.
        place = _first_missing(messages, _squeezed(text), _squeezed)
    if place is not None:
        return place
    return _first_lost_shape(template, messages, written, options)


def _first_lost_shape(
    template: ChatTemplate,
    messages: Sequence[TemplateMessage],
    written: Sequence[TemplateMessage],
    options: Mapping[str, Any],
) -> int | None:
    """As _left_out(), of short texts and calls, which may be there by chance: rendered with words that cannot be."""
    words = {
        place: f"w{secrets.token_hex(8)}w"
        for place, one in enumerate(messages)
        if one.get("tool_calls") or 0 < len((one.get("content") or "").strip()) < _SHORT_CHARS
    }
    if not words:
        return None
    tried = [_with_word(one, words.get(place, "w")) for place, one in enumerate(written)]
    try:
        trial = template.render(tried, **{**options, "continue_final_message": False})
    except ChatTemplateError:
        return None  # it looks into the texts, so nothing is known of others
    for place, word in words.items():
        marks = [f"{word}call{number}." for number in range(len(messages[place].get("tool_calls") or ()))]
        if (messages[place].get("content") or "").strip():
            marks.append(f"{word}text.")
        if any(mark not in trial for mark in marks):
            return place
    return None


def _with_word(message: TemplateMessage, word: str) -> TemplateMessage:
    """The same message with other text, and calls of another function with other texts as arguments."""
    changed = dict(message)
    if content := message.get("content"):
        text = f"{word}text."
        changed["content"] = text if isinstance(content, str) else [{"type": "text", "text": text}]
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "function": {
                "name": f"{word}call{number}.",
                "arguments": _with_texts(call["function"]["arguments"], f"{word}call{number}."),
            }}
            for number, call in enumerate(calls)
        ]  # fmt: skip
    return changed


def _with_texts(value: Any, text: str) -> Any:
    match value:
        case dict():
            return {key: _with_texts(inner, text) for key, inner in value.items()}
        case list():
            return [_with_texts(inner, text) for inner in value]
        case str():
            return text
        case _:
            return value


def _first_missing(
    messages: Sequence[TemplateMessage], text: str, form: Callable[[str], str] = str.strip
) -> int | None:
    position = 0
    for place, message in enumerate(messages):
        content = message.get("content") or ""
        # Some templates put what the system says before the last question.
        is_system = message["role"] in ("system", "developer")
        ends = [_find(text, _texts_of(message["role"], content), 0 if is_system else position, form)]
        ends += [_find_call(text, call["function"], position, form) for call in message.get("tool_calls") or ()]
        if min(ends) < 0:
            return place
        if message.get("tool_calls"):
            position = max(ends[1:])  # the text beside calls may come behind their results
        elif not is_system:
            position = ends[0]
    return None


def _texts_of(role: str, content: str) -> list[str]:
    """The text, and what may stand for it: an assistant's without its reasoning."""
    texts = [content]
    if role == "assistant":
        texts.append(_REASONING.sub("", content, count=1))
        texts.append(content.rpartition("</think>")[2])
    return texts


def _find(text: str, candidates: Sequence[str], position: int, form: Callable[[str], str]) -> int:
    """Where the first of the candidates ends that is in the text from there on; -1 if none is."""
    for candidate in candidates:
        for spelling in _spellings(candidate):
            wanted = form(spelling)
            if (found := text.find(wanted, position)) >= 0:
                return found + len(wanted)
    return -1


def _spellings(text: str) -> Iterator[str]:
    text = text.strip()
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield html.escape(text, quote=False)
    yield html.escape(text, quote=False).replace("'", "&#39;").replace('"', "&#34;")
    yield repr(text)[1:-1]


def _find_call(text: str, function: Mapping[str, Any], position: int, form: Callable[[str], str]) -> int:
    """As _find(), of every text in a call's arguments, however they are written; position if there is none."""
    end = position
    for leaf in islice(_texts_in(function["arguments"]), _MAX_ARGUMENT_TEXTS):
        found = _find(text, [leaf], position, form)
        if found < 0:
            return -1
        end = max(end, found)
    return end


def _texts_in(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _texts_in(inner)
        case list():
            for inner in value:
                yield from _texts_in(inner)


def _squeezed(text: str) -> str:
    return "".join(text.split())
