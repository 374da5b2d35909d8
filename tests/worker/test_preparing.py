"""In which order a rank compiles the grammars of requests that wait for them."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import pytest

from megatron_medha.cluster.messages import PrepareGrammar
from megatron_medha.worker import main as worker_main

WAIT_S = 60


class Socket:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def send(self, message: bytes) -> None:
        self.sent.put(message)

    def close(self) -> None:
        pass


def test_a_short_grammar_is_compiled_before_long_ones_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    socket, compiled = Socket(), []
    has_begun, may_go_on = threading.Event(), threading.Event()

    def prepare(grammar: str) -> None:
        compiled.append(grammar[:5])
        has_begun.set()
        assert may_go_on.wait(WAIT_S)

    monkeypatch.setattr(worker_main, "_connect", lambda *_: socket)
    with worker_main._preparing(None, SimpleNamespace(rank=0), prepare) as take:  # type: ignore[arg-type]
        take(PrepareGrammar(0, "first"))
        assert has_begun.wait(WAIT_S)
        take(PrepareGrammar(1, "long " * 10_000))
        take(PrepareGrammar(2, "mid   " * 1_000))
        take(PrepareGrammar(3, "short"))
        may_go_on.set()
        for _ in range(4):
            socket.sent.get(timeout=WAIT_S)
    assert compiled == ["first", "short", "mid  ", "long "]
