"""Chat templates: programs of the checkpoint that may neither hang the server nor lose a message."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from running_server import Running, StartServer

from megatron_medha.text.chat.chat_template import ChatTemplate, ChatTemplateError
from megatron_medha.text.chat.template_renders import NoRenderProcess, TemplateProcessPool
from megatron_medha.text.chat.whole_chat import render_whole
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


# ---- templates that do not end, or want everything ----


@pytest.fixture(scope="module")
def hurried() -> Iterator[TemplateProcessPool]:
    renders = TemplateProcessPool(cpu_s=0.2)
    yield renders
    renders.close()


HOSTILE = {
    "a loop": LOOP,
    "a loop in a condition": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "a constant of 10 GB": "{{ 'a' * 10**10 }}",
    "a wide constant": "{{ 'x' | center(10**10) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a wide str.format": "{{ '{:10000000000}'.format(1) }}",
    "text that doubles": "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "a long list": "{{ [messages] * 10**10 }}",
    "much output": "{{ 'ab' * (messages | length * 10**7) }}",
    "a number of 4 GB": "{{ 9 ** (9 ** 9) }}",
    "many words": "{{ lipsum(n=10**6) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_not_end_or_wants_all_memory_fails_its_chat_alone(
    hurried: TemplateProcessPool, name: str
) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template"):
        hurried.submit(ChatTemplate(HOSTILE[name], {}), USER, {}, 0).result()
    assert hurried.submit(ChatTemplate(None, {}), USER, {}, 0).result() == "user: hi\nassistant:"


@pytest.mark.parametrize(
    "reach",
    [
        "messages.__class__", "''|attr('__class__')", "'{0.__class__}'.format(messages)", "raise_exception.__globals__",
        "strftime_now.__code__", "cycler.__init__.__globals__", "self.__init__.__globals__", "lipsum.__globals__",
        "messages.append(1)", "messages[0].update(a=1)", "namespace.__init__", "joiner().__class__.__mro__",
        "(messages|attr)('__class__')", "('%s'|attr('format_map'))(messages)", "''.join.__self__.__class__",
    ],
)  # fmt: skip
def test_a_template_reaches_nothing_of_the_process(hurried: TemplateProcessPool, reach: str) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}[{{ (" + reach + ")|string }}]"
    try:
        text = hurried.submit(ChatTemplate(source, {}), USER, {}, 0).result()
    except ChatTemplateError:
        return
    assert text == "hi[]" or "%s" in text  # undefined


@pytest.mark.parametrize(
    "source",
    ["(" * 100_000, "{{ " + "(" * 50_000, "{% if 1 %}" * 20_000, "x" * (2**18 + 1), "{{ " + "9" * 5000 + " }}"],
)
def test_a_template_that_cannot_be_parsed_stops_the_start_at_once(source: str) -> None:
    if source.startswith("("):
        ChatTemplate(source, {})  # plain text
    else:
        with pytest.raises(ChatTemplateError):
            ChatTemplate(source, {})


def _with_template(tokenizer: Tokenizer, source: str) -> Tokenizer:
    return Tokenizer(tokenizer._backend, TokenizerConfig(chat_template=source))


def test_others_are_served_while_a_template_loops_and_the_chat_gets_a_400(
    start_server: StartServer, tokenizer: Tokenizer
) -> None:
    renders = TemplateProcessPool(cpu_s=0.5)
    server = start_server(tokenizer=_with_template(tokenizer, LOOP), renders=renders)
    with ThreadPoolExecutor() as threads:
        chat = threads.submit(server.post, CHAT, {"messages": USER, "max_tokens": 1})
        num_served = 0
        while not chat.done():
            assert server.get("/health").status_code == 200
            assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
            num_served += 1
    assert num_served > 1
    error = chat.result().json()["error"]
    assert chat.result().status_code == 400 and error["param"] == "messages"
    assert "the chat template has not ended after" in error["message"]
    server.assert_nothing_is_left()
    renders.close()


def test_a_server_ends_while_a_template_loops(start_server: StartServer, tokenizer: Tokenizer) -> None:
    server = start_server(tokenizer=_with_template(tokenizer, LOOP), renders=None)
    has_begun = threading.Event()
    renders = server.service.text.renders
    ask = renders._ask

    def ask_and_tell(*arguments: Any) -> Any:
        has_begun.set()
        return ask(*arguments)

    renders._ask = ask_and_tell  # type: ignore[method-assign]
    renders._cpu_s = 1e6
    with ThreadPoolExecutor() as threads:
        threads.submit(server.post, CHAT, {"messages": USER, "max_tokens": 1})
        assert has_begun.wait(60)
        server.server.should_exit = True
        server.thread.join(60)
        assert not server.thread.is_alive()
    assert not renders._idle and all(process.has_ended for process in renders._all)


def test_a_process_that_is_gone_or_stopped_is_replaced(tokenizer: Tokenizer) -> None:
    renders = TemplateProcessPool(cpu_s=0.02)
    plain = ChatTemplate(None, {})
    assert renders.submit(plain, USER, {}, 0).result() == "user: hi\nassistant:"
    (process,) = renders._idle
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert renders.submit(plain, USER, {}, 0).result() == "user: hi\nassistant:"
    (process,) = renders._idle
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(ChatTemplateError, match="does not end"):
        renders.submit(plain, USER, {}, 0).result()
    assert renders.submit(plain, USER, {}, 0).result() == "user: hi\nassistant:"
    renders.close()
    with pytest.raises(NoRenderProcess):
        renders.submit(plain, USER, {}, 0)


# ---- no message is lost ----

# As Qwen 2.5 has it: roles it does not name leave nothing.
NAMED = (
    "{% for m in messages %}{% if m.role in ('user', 'system') or (m.role == 'assistant' and not m.tool_calls) %}"
    "<{{ m.role }}>{{ m.content }}</>{% elif m.role == 'assistant' %}<assistant>{% for t in m.tool_calls %}"
    "<call>{{ t.function.name }} {{ t.function.arguments | tojson }}</call>{% endfor %}</>{% elif m.role == 'tool' %}"
    "<user><result>{{ m.content }}</result></>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen 3: roles it does not know are errors; reasoning of earlier answers goes.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% elif m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ (m.content or '').split('</think>')[-1].lstrip('\n') }}"
    "{% for t in m.tool_calls or [] %}{{ t.function | tojson }}{% endfor %}</>{% endfor %}"
)
# As Llama 3.1: a message with a call has no text, and one call.
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call') }}{% endif %}<call>{{ m.tool_calls[0].function | tojson }}</>"
    "{% else %}<{{ m.role }}>{{ m.content | trim }}</>{% endif %}{% endfor %}"
)
# As vision models: contents are lists of parts.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}</>{% endfor %}"
)
# As Mistral: what the system says comes before the last question.
SYSTEM_LATE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('users and assistants') }}{% endif %}<{{ m.role }}>"
    "{% if loop.last and system is defined %}{{ system }} {% endif %}{{ m.content }}</>{% endfor %}"
)


def _call(name: str = "f", call_id: str = "c1", **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


IN_TURN = (  # as Gemma and Mistral
    "{% for m in messages %}{{ raise_exception('in turn') if loop.previtem and loop.previtem.role == m.role }}"
    "<{{ m.role }}>{{ m.content }}{% for t in m.tool_calls or [] %}{{ t.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}"
)


def _said(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


HI, FRENCH = _said("user", "hi"), _said("developer", "ANSWER IN FRENCH, ALWAYS AND EVERYWHERE")
TWO_CALLS = _said("assistant", "let me see", tool_calls=[_call(a="one"), _call("g", "c2", b=2)])
RESULTS = [_said("tool", "sun", tool_call_id="c1"), _said("tool", "rain", tool_call_id="c2")]


@pytest.mark.parametrize(
    ("source", "messages", "prompt"),
    [
        (NAMED, [FRENCH, HI], "<system>ANSWER IN FRENCH, ALWAYS AND EVERYWHERE</><user>hi</>"),
        (STRICT, [FRENCH, HI], "<system>ANSWER IN FRENCH, ALWAYS AND EVERYWHERE</><user>hi</>"),
        (PARTS, [FRENCH, HI], "<developer>ANSWER IN FRENCH, ALWAYS AND EVERYWHERE</><user>hi</>"),
        # A text that the prompt holds for other reasons is not taken for the message.
        (NAMED, [_said("developer", "user"), HI], "<system>user</><user>hi</>"),
        (NAMED, [_said("developer", "s"), _said("system", "s"), HI], "<system>s</><system>s</><user>hi</>"),
        (STRICT, [_said("system", "A"), HI, _said("developer", "B"), HI], "<system>A\n\nB</><user>hi</><user>hi</>"),
        (STRICT, [HI, _said("system", "A")], "<system>A</><user>hi</>"),
        (NAMED, [HI, _said("assistant", None, tool_calls=[_call(a=1)]), _said("function", "sun", name="f")],
         '<user>hi</><assistant><call>f {"a": 1}</call></><user><result>sun</result></>'),
        (NAMED, [HI, TWO_CALLS, *RESULTS],
         '<user>hi</><assistant>let me see</><assistant><call>f {"a": "one"}</call></><user><result>sun</result></>'
         '<assistant><call>g {"b": 2}</call></><user><result>rain</result></>'),
        (ONE_CALL, [HI, TWO_CALLS, *RESULTS],
         '<user>hi</><assistant>let me see</><call>{"name": "f", "arguments": {"a": "one"}}</><tool>sun</>'
         '<call>{"name": "g", "arguments": {"b": 2}}</><tool>rain</>'),
        (STRICT, [HI, _said("assistant", "<think>\nhm\n</think>\n\nhello"), HI],
         "<user>hi</><assistant>hello</><user>hi</>"),
        (ONE_CALL, [_said("user", "  two \n words ")], "<user>two \n words</>"),
        (SYSTEM_LATE, [_said("system", "be kind to everybody who asks"), HI, _said("assistant", "yes"), HI],
         "<user>hi</><assistant>yes</><user>be kind to everybody who asks hi</>"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
         [_said("user", 'a "quoted"\nline of some length')],
         '"a \\"quoted\\"\\nline of some length"'),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", [_said("user", "if a < b && c > d: it's <b>")],
         "if a &lt; b &amp;&amp; c &gt; d: it&#39;s &lt;b&gt;"),
        ("{% for m in messages %}{{ m.content | indent(2) }}{% endfor %}",
         [_said("user", "a line of text\nanother one")],
         "a line of text\n  another one"),
        ("{% for m in messages %}{% for t in m.tool_calls or [] %}<function={{ t.function.name }}>"
         "{% for k, v in t.function.arguments.items() %}<parameter={{ k }}>{{ v }}</parameter>{% endfor %}{% endfor %}"
         "{{ m.content or '' }}{% endfor %}", [_said("assistant", None, tool_calls=[_call(a="<é>", b=[1.5, "x"])])],
         "<function=f><parameter=a><é></parameter><parameter=b>[1.5, 'x']</parameter>"),
        # Calls and results as text, where a template has no place for them.
        ("{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}",
         [HI, _said("assistant", None, tool_calls=[_call(a=1)]), _said("tool", "sun", tool_call_id="c1"), HI],
         '<user>hi<assistant><tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
         "<user><tool_response>\nsun\n</tool_response>\nhi"),
        ("{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}<{{ m.content }}>{% endfor %}",
         [_said("system", "be kind"), HI], "<be kind\n\nhi>"),
        ("{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}<{{ m.content }}>{% endfor %}",
         [_said("system", "be kind")], "<be kind>"),
        # Turns of one role, where they must alternate.
        (IN_TURN, [HI, _said("user", "you"), _said("assistant", None), _said("assistant", "yes"), _said("user", "go")],
         "<user>hi\n\nyou<assistant>yes<user>go"),
        (IN_TURN, [HI, _said("assistant", "let me look"), _said("assistant", None, tool_calls=[_call(a="b")])],
         '<user>hi<assistant>let me look{"a": "b"}'),
        # Reasoning of an earlier turn, where the template has a place for it.
        ("{% for m in messages %}[{{ m.reasoning_content }}]{{ m.content }}{% endfor %}",
         [_said("assistant", "so", reasoning_content="why")], "[why]so"),
    ],
)  # fmt: skip
def test_every_message_reaches_the_prompt(source: str, messages: list[dict[str, Any]], prompt: str) -> None:
    assert render_whole(ChatTemplate(source, {}), messages, add_generation_prompt=False).text == prompt


@pytest.mark.parametrize(
    ("source", "messages", "place"),
    [
        ("{{ messages[-1].content }}", [_said("user", "first"), HI], 0),
        ("{% for m in messages %}{{ m.content[:20] }}{% endfor %}", [HI, _said("user", "a text that is cut" * 9)], 1),
        ("{% for m in messages | reverse %}<{{ m.content }}>{% endfor %}",
         [_said("user", "one question of some length"), _said("assistant", "one answer of some length")], 1),
    ],
)  # fmt: skip
def test_a_message_that_cannot_reach_the_prompt_is_named(
    source: str, messages: list[dict[str, Any]], place: int
) -> None:
    with pytest.raises(ChatTemplateError, match=f"leaves out this message of role {messages[place]['role']}") as caught:
        render_whole(ChatTemplate(source, {}), messages)
    assert caught.value.place == place


def test_what_a_template_itself_refuses_is_answered_in_its_words() -> None:
    with pytest.raises(ChatTemplateError, match="refuses these messages: users begin"):
        render_whole(ChatTemplate(
            "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}", {}
        ), [_said("assistant", "hi")])  # fmt: skip


GENERIC = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


@pytest.mark.parametrize("source", [SYSTEM_LATE, GENERIC])
def test_calls_and_results_become_text_for_templates_that_know_none(source: str) -> None:
    messages = [HI, TWO_CALLS, *RESULTS, _said("assistant", "it depends"), HI]
    text = render_whole(ChatTemplate(source, {}), messages).text
    assert text == (
        '<user>hi</><assistant>let me see\n<tool_call>\n{"name": "f", "arguments": {"a": "one"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"b": 2}}\n</tool_call></>'
        "<user><tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response></>"
        "<assistant>it depends</><user>hi</>"
    )


def test_ids_of_calls_and_results_become_short_alike_where_the_template_wants_that() -> None:
    source = (
        "{% for m in messages %}{% for t in m.tool_calls or [] %}"
        "{% if t.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}[{{ t.id }} {{ t.function.name }}]"
        "{% else %}{{ m.tool_call_id }}:{{ m.content }};{% endfor %}{% endfor %}"
    )
    call = _said("assistant", None, tool_calls=[_call(call_id="call_0123456789abcdef"), _call("g", "abcdef012")])
    results = [_said("tool", "A", tool_call_id="call_0123456789abcdef"), _said("tool", "B", tool_call_id="abcdef012")]
    text = render_whole(ChatTemplate(source, {}), [call, *results]).text
    short_id = text[1:10]
    assert text == f"[{short_id} f][abcdef012 g]{short_id}:A;abcdef012:B;"


def test_text_beside_a_call_may_come_behind_its_result() -> None:
    source = (
        "{% for m in messages %}{% for t in m.tool_calls or [] %}[{{ t.function.name }}]"
        "{{ messages[loop.index].content }}{% endfor %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    said = _said("assistant", "one sentence beside the call", tool_calls=[_call()])
    result = _said("tool", "one result of the call, in words", tool_call_id="c1")
    text = render_whole(ChatTemplate(source, {}), [said, result]).text
    assert text == "[f]one result of the call, in wordsone sentence beside the call"


TEXTS = ("<", "|", "e", "im_end", ">", "Sure, ", "```json\n", "{\n  ", "", "\n", "</", "assistant", "  a  ", "é ")


@pytest.mark.parametrize("source", [NAMED, PARTS])
@pytest.mark.parametrize("text", TEXTS)
def test_a_final_message_is_continued_exactly_where_it_ends(source: str, text: str) -> None:
    messages = [HI, _said("assistant", text)]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert render_whole(ChatTemplate(source, {}), messages, **options).text == f"<user>hi</><assistant>{text}"


def test_routes_map_roles_and_name_lost_messages(start_server: StartServer, tokenizer: Tokenizer) -> None:
    server = start_server(tokenizer=_with_template(tokenizer, NAMED))

    def prompt() -> str:
        return bytes(server.engine.submitted[-1].prompt.tolist()).decode()

    wanted = "<system>ANSWER IN FRENCH, ALWAYS AND EVERYWHERE</><user>hi</><assistant>"
    assert server.post(CHAT, {"messages": [FRENCH, HI], "max_tokens": 1}).status_code == 200
    assert prompt() == wanted
    assert server.post("/v1/responses", {"input": [FRENCH, HI], "max_output_tokens": 1}).status_code == 200
    assert prompt() == wanted
    assert server.post("/tokenize", {"messages": [FRENCH, HI]}).json()["count"] == len(wanted)
    _check_lost(start_server(tokenizer=_with_template(tokenizer, "{{ messages[-1].content }}")))


def test_what_a_template_has_no_place_for_is_refused(start_server: StartServer, tokenizer: Tokenizer) -> None:
    server = start_server(tokenizer=_with_template(tokenizer, NAMED))
    for fields, param in (
        ({"documents": [{"text": "d"}]}, "documents"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt"),
    ):
        answer = server.post(CHAT, {"messages": [HI], "max_tokens": 1, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert server.post(CHAT, {"messages": [HI], "documents": [], "max_tokens": 1}).status_code == 200


def test_calls_of_a_message_that_is_continued_are_not_cut_off() -> None:
    source = NAMED.replace("<assistant>{% for t", "<assistant>{{ m.content }}{% for t")
    said = _said("assistant", "let me see", tool_calls=[_call(a=1)])
    text = render_whole(ChatTemplate(source, {}), [HI, said], continue_final_message=True).text
    assert text.endswith('"arguments": {"a": 1}}\n</tool_call>')


def _check_lost(server: Running) -> None:
    for path in (CHAT, "/tokenize"):
        answer = server.post(path, {"messages": [_said("user", "first"), HI]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages[0]", json.dumps(answer.json())
