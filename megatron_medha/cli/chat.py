"""`medha chat`: a conversation with a server, from a terminal."""

from __future__ import annotations

import http.client
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO
from urllib.parse import urlsplit

from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.core.errors import MedhaError
from megatron_medha.options.option_errors import check_http_url

HELP = "/quit or Ctrl-D ends, /clear forgets the conversation, /system TEXT sets the system prompt, Ctrl-C stops output"

USAGE = f"""\
usage: medha chat [URL] [key=value ...]

Chats with a running server. {HELP}.

examples:
  medha chat
  medha chat http://127.0.0.1:8001 temperature=0.7 'system_prompt="Answer in one sentence."'
"""

_READY_TIMEOUT_S = 10.0


class ChatError(MedhaError):
    """The server refused a message or cannot be reached; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """Which server, and how it should answer."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None        # None: the first one that is served
    system_prompt: str | None = None
    api_key: str | None = None
    max_tokens: int | None = None   # None: what fits
    temperature: float | None = None
    timeout_s: float = 600.0        # between two pieces of an answer; long prompts prefill for minutes

    def __post_init__(self) -> None:
        check_http_url("url", self.url)


@dataclass
class Conversation:
    """What has been said, and the server it is said to."""

    config: ChatConfig
    messages: list[dict[str, str]] = field(default_factory=list)
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # the server keeps its KV for the next turn

    def __post_init__(self) -> None:
        if self.config.system_prompt:
            self.set_system(self.config.system_prompt)

    def set_system(self, text: str) -> None:
        """Begin with this system prompt from now on."""
        self.messages = [{"role": "system", "content": text}, *(m for m in self.messages if m["role"] != "system")]

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def say(self, text: str) -> Iterator[str]:
        """Send a message and yield the answer as it comes; ChatError leaves the conversation as it was.

        An answer that is broken off stays in the conversation as far as it came.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        is_error = False
        try:
            for piece in self._stream(said):
                answer.append(piece)
                yield piece
        except ChatError:
            is_error = True
            raise
        finally:
            if not is_error:
                self.messages = [*said, {"role": "assistant", "content": "".join(answer)}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        config = self.config
        body: dict[str, Any] = {"messages": messages, "stream": True}
        given = {name: getattr(config, name) for name in ("model", "max_tokens", "temperature")}
        body |= {name: value for name, value in given.items() if value is not None}
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        headers["X-Session-Id"] = self.session_id
        if config.api_key:
            headers["Authorization"] = f"Bearer {config.api_key}"
        connection = _connection(config, config.timeout_s)
        try:
            path = f"{_base_path(config)}/v1/chat/completions"
            connection.request("POST", path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ChatError(f"{response.status}: {_error_text(response.read())}")
            yield from _texts(response)
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"no response from {config.url}: {error or type(error).__name__}") from error
        finally:
            connection.close()


def run(words: Sequence[str]) -> int:
    """Talk until /quit or the end of input."""
    config = read_options("chat", words, USAGE, lambda: ChatConfig)
    if config is not None:
        check_ready(config)
        chat(config)
    return 0


def check_ready(config: ChatConfig) -> None:
    """Raises ChatError if nobody could answer there: no server, or one whose model is not loaded."""
    connection = _connection(config, min(config.timeout_s, _READY_TIMEOUT_S))
    try:
        connection.request("GET", f"{_base_path(config)}/ready")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ChatError(
            f"no server at {config.url} ({error or type(error).__name__}); "
            "`medha serve DIR` starts one, and url=URL names another"
        ) from error
    finally:
        connection.close()
    if response.status == 503:  # other servers have no such route; their answers will tell
        raise ChatError(f"{config.url} takes no requests yet: {_state(body)}")


def _state(body: bytes) -> str:
    try:
        state = json.loads(body)
        return " ".join(str(state[name]) for name in ("status", "detail") if state.get(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "503"


def _connection(config: ChatConfig, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(config.url)
    assert parts.hostname is not None, "checked by ChatConfig"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, parts.port, timeout=timeout_s)


def _base_path(config: ChatConfig) -> str:
    return urlsplit(config.url).path.rstrip("/").removesuffix("/v1")


def chat(config: ChatConfig, *, read_line: Callable[[str], str] = input, out: TextIO | None = None) -> None:
    """Talk until /quit or the end of input."""
    out = sys.stdout if out is None else out
    conversation = Conversation(config)
    print(f"{config.url}; {HELP}", file=out)
    while True:
        try:
            line = read_line("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/clear":
                conversation.clear()
            case "/system":
                conversation.set_system(rest)
            case "/help":
                print(HELP, file=out)
            case _:
                _answer(conversation, line, out)


def _answer(conversation: Conversation, line: str, out: TextIO) -> None:
    answer = conversation.say(line)
    try:
        for piece in answer:
            out.write(piece)
            out.flush()
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]  # a generator; closing it closes the connection, which ends the request
        out.write(" [stopped]")
    except ChatError as error:
        out.write(f"[{error}]")
    out.write("\n")


def _texts(response: http.client.HTTPResponse) -> Iterator[str]:
    for raw in response:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue  # blank lines between events, and comments
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(_error_text(data))
        for choice in event.get("choices", ()):
            yield choice.get("delta", {}).get("content") or ""
    raise ChatError("the server closed the connection before the response was complete")


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
