"""Compiling grammars in processes of their own: a few at once, each ended where it takes too long."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from megatron_medha.core.errors import MedhaError
from megatron_medha.engine.child_environment import child_environment
from megatron_medha.engine.grammar_process import COMMAND, Trial, Tried, Vocabulary
from megatron_medha.engine.guidance import GrammarError

log = logging.getLogger(__name__)

_MAX_PROCESSES = 4       # started as they are needed; one that hangs leaves three to the others
_QUEUE_S = 10.0          # for a place among those
_START_S = 60.0          # to load the library and a large vocabulary, on a machine that is busy with the model
_MAX_ANSWER_BYTES = 2**24  # the grammar comes back, and is as long as what was sent


class TrialsBusy(MedhaError):
    """All processes are taken, or none comes up."""


class TooMuch(MedhaError):
    """The grammar took too long, or more memory than there is for it."""


class GrammarTrials:
    """The processes. Event loop only."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], environment: Mapping[str, str] | None = None) -> None:
        """vocabulary: called on a thread, once, when the first grammar comes.

        environment: of the processes; None: ours without what looks like a secret.
        """
        self._environment = child_environment() if environment is None else environment
        self._vocabulary = vocabulary
        self._first_line = b""
        self._places = asyncio.Semaphore(_MAX_PROCESSES)
        self._idle: list[Process] = []
        self._all: set[Process] = set()
        self._is_closed = False

    async def compile(self, trial: Trial, timeout_s: float) -> str:
        """The grammar; GrammarError with the library's reason, TooMuch or TrialsBusy where there is none."""
        try:
            async with asyncio.timeout(_QUEUE_S):
                await self._places.acquire()
        except TimeoutError:
            raise TrialsBusy("too many grammars are being compiled") from None
        try:
            tried = await self._try(trial, timeout_s)
            if tried is None:
                tried = await self._try(trial, timeout_s)  # the process may have been ended before it was asked
        finally:
            self._places.release()
        if tried is None:
            raise TooMuch("compiling it took more memory than there is for it")
        if tried.error is not None:
            raise GrammarError(tried.error)
        return tried.grammar

    async def close(self) -> None:
        """End all processes; what waits for one gets TrialsBusy."""
        self._is_closed = True
        for process in tuple(self._all):
            await self._end(process)

    async def _try(self, trial: Trial, timeout_s: float) -> Tried | None:
        """None if the process has ended over it."""
        process = await self._process()
        tried: Tried | None = None
        try:
            async with asyncio.timeout(timeout_s):
                tried = await _ask(process, msgspec.json.encode(trial) + b"\n")
        except TimeoutError:
            raise TooMuch(f"not compiled within {timeout_s:g} s") from None
        finally:
            if tried is None:  # it hangs, or is dead
                await self._end(process)
            else:
                self._idle.append(process)
        return tried

    async def _process(self) -> Process:
        if self._is_closed:
            raise TrialsBusy("the server is shutting down")
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
            self._all.discard(process)
        if not self._first_line:
            self._first_line = await asyncio.to_thread(lambda: msgspec.json.encode(self._vocabulary()) + b"\n")
        command = (sys.executable, *COMMAND, str(os.getpid()))
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, limit=_MAX_ANSWER_BYTES, env=self._environment
            )
        except OSError as error:  # no descriptor, process or memory to be had just now
            log.error("grammar_process_not_started", extra={"fields": {"why": str(error)}})
            raise TrialsBusy("no process to compile grammars can be started; try again later") from None
        self._all.add(process)
        tried: Tried | None = None
        try:
            async with asyncio.timeout(_START_S):
                tried = await _ask(process, self._first_line)
        except TimeoutError:
            pass
        finally:
            if tried is None or tried.error is not None:
                await self._end(process)
        if tried is None:
            log.error("grammar_process_failed", extra={"fields": {"code": process.returncode}})
            raise TrialsBusy("the process that compiles grammars does not come up; the server's log may say why")
        if tried.error is not None:
            raise GrammarError(tried.error)
        return process

    async def _end(self, process: Process) -> None:
        self._all.discard(process)
        if process.returncode is None:
            with suppress(ProcessLookupError):  # it has ended, and the loop has not heard yet
                process.kill()
        await process.wait()


async def _ask(process: Process, line: bytes) -> Tried | None:
    """What it answers; None if it has ended instead."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        return None
    answer = await process.stdout.readline()
    return msgspec.json.decode(answer, type=Tried) if answer else None
