"""A server that listens on a loopback port, what tests ask of it, and a tokenizer for it."""

from __future__ import annotations

import socket
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import tokenizers
import uvicorn
from fake_engine import WAIT_S, FakeEngine
from tokenizers import decoders, models, pre_tokenizers

from megatron_medha.core.sampling import Sampling
from megatron_medha.server.generation import GenerationSpec, Prompt
from megatron_medha.server.service import Service

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer_backend() -> tokenizers.Tokenizer:
    """Ids 0 to 255 are bytes, 256 is <s>, 257 is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert sorted(vocab) == alphabet
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@dataclass
class Running:
    """A server that listens."""

    url: str
    port: int
    engine: FakeEngine
    service: Service
    server: uvicorn.Server
    thread: threading.Thread
    client: httpx.Client  # one for all: making one loads certificates, which takes longer than most tests

    def post(self, path: str, body: object = None, **kwargs: object) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body, **kwargs)

    def get(self, path: str, **kwargs: object) -> httpx.Response:
        """GET a path."""
        return self.client.get(path, **kwargs)

    def events(self, path: str, body: dict) -> list[str]:
        """The data of every event of a stream."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = list(response.iter_lines())
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def connect(self, path: str, body: bytes, headers: str = "", receive_bytes: int | None = None) -> socket.socket:
        """Send a POST over a raw socket; receive_bytes: of its buffer, for a reader that soon stalls."""
        connection = socket.socket()
        connection.settimeout(WAIT_S)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def assert_nothing_is_left(self) -> None:
        """No sub-request in the engine, no stream waiting for one."""
        self.engine.wait_until_idle()
        # Sub-requests end before their streams are closed; both within one turn of the loop.
        self.wait_until(lambda: len(self.service.streams) == 0)

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Look at the server, on its own loop, until it is so."""
        done = threading.Event()

        def check() -> None:
            if is_true():
                done.set()
            else:
                loop.call_later(0.001, check)

        loop = self.service.streams._loop
        assert loop is not None
        loop.call_soon_threadsafe(check)
        assert done.wait(WAIT_S), "it never came to pass"


def eventually(is_true: Callable[[], bool]) -> None:
    """Look at what the server does after an answer has gone out, and nobody tells, until it is done."""
    deadline_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.001)


def spec(num_tokens: int = 4, n: int = 1, **fields: object) -> GenerationSpec:
    """A request with a prompt of so many tokens."""
    prompt = Prompt(token_ids=array("i", [1] * num_tokens), text=None, max_output_tokens=5)
    return GenerationSpec(
        response_id="x", created=0, model="m", arrival_s=0.0, prompts=(prompt,), n=n, num_answered=n,
        sampling=Sampling(max_output_tokens=1), seed=0, **fields,
    )  # fmt: skip


StartServer = Callable[..., Running]
