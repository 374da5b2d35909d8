"""One streaming completion as a client of any OpenAI-compatible server sees it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import aiohttp

from megatron_medha.core.errors import ConfigError

# A line of a stream may hold the log-probabilities of a whole prompt; aiohttp's own limit of 64 KiB would end it.
_READ_BUFFER_BYTES = 1 << 22
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under load."""

    url: str                                  # without /v1
    model: str | None = None                  # None: the first one it lists
    api_key: str | None = None
    request_timeout_s: float = 3600.0
    headers: dict[str, str] = field(default_factory=dict)

    def session(self) -> aiohttp.ClientSession:
        """Connections of its own for every request, as many as there are requests at a time."""
        headers = dict(self.headers)
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return aiohttp.ClientSession(
            headers=headers,
            # Some servers close an idle connection just as the next request goes out: that is no fault of theirs.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self.request_timeout_s),
            read_bufsize=_READ_BUFFER_BYTES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRange:
    """Ids that prompts are drawn from. The defaults are in every vocabulary, those of bytes included."""

    lowest: int = 32
    highest: int = 126

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest:
            raise ConfigError(
                f"lowest_token={self.lowest}: must be between 0 and highest_token={self.highest}"
            )

    def prompt(self, num_tokens: int, seed: int, name: str) -> list[int]:
        """num_tokens ids, uniformly; no two prompts share a prefix worth caching."""
        draw = Random(f"{seed}/{name}")
        return draw.choices(range(self.lowest, self.highest + 1), k=num_tokens)


@dataclass(slots=True)
class StreamResult:
    """What came back; times are of time.monotonic()."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)  # one per event that brought text or a token
    num_tokens: int = 0         # by the server's own count, where it gives one
    num_prompt_tokens: int | None = None  # likewise
    num_cached_tokens: int | None = None  # of the prompt, likewise
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # of the output, where the server gives them
    status: int | None = None   # of HTTP; None: no answer at all
    error: str | None = None


class ListedModel(NamedTuple):
    """A model as a server lists it."""

    name: str
    max_tokens: int | None  # of prompt and output together; None: it does not say


async def find_model(target: Target, session: aiohttp.ClientSession) -> ListedModel:
    """The model that is asked for, or else the first. Raises ConfigError if the server has no list of models."""
    try:
        async with session.get(f"{target.url}/v1/models") as response:
            models = (await response.json(content_type=None))["data"]
            name = target.model or str(models[0]["id"])
            max_tokens = next((one.get("max_model_len") for one in models if one["id"] == name), None)
            return ListedModel(name, max_tokens if isinstance(max_tokens, int) else None)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConfigError(f"url={target.url}: connection failed ({error}); try `medha serve`") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"url={target.url}: GET /v1/models answered {response.status}, not a list of models ({error!r}); "
            "is an api_key missing, or is this not an OpenAI-compatible server?"
        ) from None


def completion_body(
    target: Target, model: str, prompt: Sequence[int] | str, max_tokens: int, fields: Mapping[str, object] = _NOTHING
) -> bytes:
    """What is posted for one greedy streaming completion of exactly max_tokens tokens; fields: more of the body."""
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return json.dumps(body, separators=(",", ":")).encode()


async def run_completion(
    target: Target, session: aiohttp.ClientSession, body: bytes, max_tokens: int,
    headers: Mapping[str, str] = _NOTHING,
) -> StreamResult:  # fmt: skip
    """One completion_body, sent and read to its end. Failures are in the result."""
    streamed = StreamResult(time.monotonic())
    try:
        async with session.post(
            f"{target.url}/v1/completions", data=body, headers={"Content-Type": "application/json", **headers}
        ) as response:
            streamed.status = response.status
            if response.status != 200:
                streamed.error = _message(await response.text())
            else:
                async for event in _events(response):
                    _record_event(streamed, event, time.monotonic())
    except TimeoutError:
        streamed.error = f"no end within {target.request_timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        streamed.error = f"{type(error).__name__}: {error}"
    streamed.num_tokens = streamed.num_tokens or len(streamed.token_times_s)
    if len(streamed.token_times_s) == streamed.num_tokens + 1:
        streamed.token_times_s.pop()  # some servers say why a stream ended in an event of its own
    if streamed.error is None and streamed.num_tokens != max_tokens:
        streamed.error = f"{streamed.num_tokens} tokens instead of {max_tokens}"
    return streamed


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data:") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[5:])


def _record_event(streamed: StreamResult, event: dict[str, Any], now_s: float) -> None:
    if "error" in event:
        streamed.error = _message(json.dumps(event))
    elif event.get("choices"):
        streamed.token_times_s.append(now_s)
        choice = event["choices"][0]
        streamed.text += choice.get("text") or ""
        # llama.cpp's server has them among what it adds for debugging.
        streamed.token_ids += choice.get("token_ids") or event.get("__verbose", {}).get("tokens") or ()
    if usage := event.get("usage"):
        streamed.num_tokens = usage["completion_tokens"]
        streamed.num_prompt_tokens = usage.get("prompt_tokens")
        streamed.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _message(text: str) -> str:
    """The error in OpenAI's shape, or the beginning of whatever was sent."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
