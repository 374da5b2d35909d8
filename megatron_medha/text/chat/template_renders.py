"""Chat templates rendered in processes of their own: a few, started when they are needed, ended where they hang."""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from megatron_medha.core.errors import MedhaError
from megatron_medha.text.chat.chat_template import ChatTemplate, ChatTemplateError
from megatron_medha.text.chat.template_process import COMMAND, HEADER, RenderJob, RenderResult

log = logging.getLogger(__name__)

_LONG_CHARS = 400_000    # a longer chat waits for its like only
_CPU_S = 2.0             # that a template may take, ...
_CPU_S_PER_CHAR = 1e-6   # ... and more for long messages: the usual ones take a hundredth of that
_WALL_PER_CPU = 10.0     # on a machine that is busy with the model
_START_S = 60.0
_SLICE = 256             # messages
_VARIABLES = ("tools", "extra")  # options that hold what clients sent
_MAX_OUTPUT_BYTES = 2**26  # and forty times what was sent; the process itself stays far below
_INHERITED_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")


class NoRenderProcess(MedhaError):
    """None comes up, or the server is shutting down."""


class TemplateProcessPool:
    """The processes, and the threads that wait for them. submit() and close() may be called from any thread."""

    def __init__(self, cpu_s: float = _CPU_S) -> None:
        """cpu_s: that a template may take over short messages."""
        self._cpu_s = cpu_s
        self._short = ThreadPoolExecutor(max_workers=2, thread_name_prefix="render")
        self._long = ThreadPoolExecutor(max_workers=2, thread_name_prefix="long-render")
        self._lock = threading.Lock()
        self._idle: list[_RenderProcess] = []
        self._all: set[_RenderProcess] = set()
        self._is_closed = False
        self._logged_mappings: set[str] = set()

    def submit(
        self, template: ChatTemplate, messages: Iterable[dict[str, Any]], options: dict[str, Any], num_chars: int
    ) -> Future[str]:
        """The prompt's text. ChatTemplateError if the template refuses the messages, loses one, or does not end;
        NoRenderProcess if there is none to render it.

        messages: gone through on another thread; what that raises is raised. options: of ChatTemplate.render.
        """
        threads = self._short if num_chars <= _LONG_CHARS else self._long
        cpu_s = self._cpu_s + _CPU_S_PER_CHAR * num_chars
        try:
            return threads.submit(self._render, template, messages, options, cpu_s)
        except RuntimeError:
            raise NoRenderProcess("the server is shutting down") from None

    def prepare(self, template: ChatTemplate) -> None:
        """Start a process and compile the template there, so that the first chat need not wait for it."""
        with suppress(NoRenderProcess):
            self.submit(template, [{"role": "user", "content": "hi"}], {}, 0).add_done_callback(_log_error)

    def close(self) -> None:
        """End all processes; what waits for one gets NoRenderProcess."""
        with self._lock:
            self._is_closed = True
            processes, idle = tuple(self._all), tuple(self._idle)
            self._idle.clear()
        for process in processes:
            process.kill()
        for process in idle:  # those that a thread waits for are closed by it
            process.close()
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)

    def _render(
        self, template: ChatTemplate, messages: Iterable[dict[str, Any]], options: dict[str, Any], cpu_s: float
    ) -> str:
        try:
            payload = pickle.dumps(_job(template, messages, options, cpu_s), protocol=5)
        except RecursionError:
            raise ChatTemplateError("the messages are nested too deeply") from None
        rendered = self._ask(self._take(), payload, cpu_s)
        if rendered is None and self._is_closed:
            raise NoRenderProcess("the server is shutting down")
        if rendered is None:
            raise ChatTemplateError("the chat template does not end, or uses too much memory")
        if rendered.error is not None:
            raise ChatTemplateError(rendered.error, rendered.place)
        if rendered.mapping:
            self._log_mapping(rendered.mapping)
        return rendered.text

    def _ask(self, process: _RenderProcess, payload: bytes, cpu_s: float) -> RenderResult | None:
        """None if the process has ended over it, or was ended."""
        rendered = process.ask(payload, _START_S * process.is_new + _WALL_PER_CPU * cpu_s)
        with self._lock:
            if rendered is not None and not self._is_closed:
                self._idle.append(process)
                return rendered
            self._all.discard(process)
        process.kill()
        process.close()
        return rendered

    def _take(self) -> _RenderProcess:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if not process.has_ended:
                    return process
                self._all.discard(process)
        try:
            process = _RenderProcess()
        except OSError as error:  # no descriptors, no memory
            raise NoRenderProcess(f"no process for chat templates can be started: {error}") from None
        with self._lock:
            if not self._is_closed:
                self._all.add(process)
                return process
        process.kill()
        process.close()
        raise NoRenderProcess("the server is shutting down")

    def _log_mapping(self, mapping: str) -> None:
        if mapping not in self._logged_mappings:
            self._logged_mappings.add(mapping)
            log.info("chat_messages_rewritten", extra={"fields": {"mapping": mapping}})


def _job(
    template: ChatTemplate, messages: Iterable[dict[str, Any]], options: dict[str, Any], cpu_s: float
) -> RenderJob:
    # In slices: the interpreter's lock is held while one is written, and the event loop waits for it.
    left = iter(messages)
    slices = []
    while some := list(islice(left, _SLICE)):
        slices.append(pickle.dumps(some, protocol=5))
    plain = {name: value for name, value in options.items() if name not in _VARIABLES}
    variables = {name: options[name] for name in _VARIABLES if name in options}
    try:
        written = msgspec.json.encode(variables)
    except OverflowError:  # an integer of more than 64 bits
        written = json.dumps(variables).encode()
    return RenderJob(template.source, template.special_tokens, slices, plain, written, cpu_s)


def _log_error(rendered: Future[str]) -> None:
    error = None if rendered.cancelled() else rendered.exception()
    if error is not None and not isinstance(error, NoRenderProcess):  # as when the server is stopped meanwhile
        log.warning("chat_template_not_prepared", extra={"fields": {"reason": str(error)}})


class _RenderProcess:
    """One process, used by one thread at a time."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        self.is_new = True
        environment = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, payload: bytes, timeout_s: float) -> RenderResult | None:
        """Its result; None if it ends instead, or takes longer."""
        deadline_s = time.monotonic() + timeout_s
        try:
            self._connection.settimeout(timeout_s)
            self._connection.sendall(HEADER.pack(len(payload)) + payload)
            num_bytes = HEADER.unpack(self._receive(HEADER.size, deadline_s))[0]
            if num_bytes > _MAX_OUTPUT_BYTES + 40 * len(payload):
                return None
            answer = self._receive(num_bytes, deadline_s)
        except (OSError, EOFError):
            return None
        self.is_new = False
        try:
            return msgspec.msgpack.decode(answer, type=RenderResult)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def kill(self) -> None:
        """End it, whatever it does; another thread that waits for its result gets None."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Give its descriptor back; nobody waits for it."""
        self._connection.close()

    def _receive(self, num_bytes: int, deadline_s: float) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            self._connection.settimeout(max(1e-3, deadline_s - time.monotonic()))
            part = self._connection.recv(min(num_bytes - len(received), 2**20))
            if not part:
                raise EOFError
            received += part
        return bytes(received)
