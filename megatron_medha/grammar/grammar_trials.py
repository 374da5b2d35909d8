"""Compiling grammars in processes of their own, each ended where it takes too long.

There are two lanes. A grammar first gets a fifth of a second of computing in the quick one, then all of its time in
the slow one, of which no client gets all places. What looks like something of its client that took longer of late goes
to the slow one directly. So a small grammar never waits for those that take long, from any client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_medha.core.errors import MedhaError
from megatron_medha.grammar.fair_places import FairSemaphore
from megatron_medha.grammar.grammar_process import COMMAND, CompileRequest, CompileResult, GrammarVocabulary
from megatron_medha.grammar.guidance import GrammarError
from megatron_medha.system.secret_values import child_environment

log = logging.getLogger(__name__)

_FAST_LANE_SLOTS = 2     # processes at most, in all: these and the slow ones
_FAST_LANE_S = 0.2       # of computing; nearly all grammars take some milliseconds
_MAX_WAITS = 10          # times that long on the clock, where the machine is busy with other things
_SLOW_LANE_SLOTS = 3
_MAX_SLOW_PER_CLIENT = 2  # so that one is left to others
_QUEUE_S = 10.0          # for a place among those
_MAX_WAITING_PER_CLIENT = 256
_SUSPECT_S = 60.0        # how long a client's grammars are judged by one that took too long
_MANY_SHAPES = 8         # of those: whatever is as long as one of them is suspect then
_MAX_CLIENTS = 1000
_NO_SHAPE = re.compile(r"[\w\s]+")
_START_S = 60.0          # to load the library and a large vocabulary, on a machine that is busy with the model
_MAX_RESULT_BYTES = 2**24  # the grammar comes back, and is as long as what was sent


class CompilerBusy(MedhaError):
    """All processes are taken, or none comes up."""


class CompileLimitExceeded(MedhaError):
    """The grammar took too long, or more memory than there is for it."""


@dataclass(slots=True)
class _SlowGrammars:
    """What a client's grammars were like that took longer than the quick lane gives."""

    shapes: set[int]
    least_size: int
    until_s: float


class GrammarProcessPool:
    """The processes. Event loop only."""

    def __init__(
        self, vocabulary: Callable[[], GrammarVocabulary], environment: Mapping[str, str] | None = None
    ) -> None:
        """vocabulary: called on a thread, once, when the first grammar comes.

        environment: of the processes; None: ours without what looks like a secret.
        """
        self._environment = child_environment() if environment is None else environment
        self._vocabulary = vocabulary
        self._first_line = b""
        self._fast_lane = FairSemaphore(_FAST_LANE_SLOTS, _FAST_LANE_SLOTS)
        self._slow_lane = FairSemaphore(_SLOW_LANE_SLOTS, _MAX_SLOW_PER_CLIENT)
        self._overdue: dict[str, _SlowGrammars] = {}  # by client
        self._spare: asyncio.Task[None] | None = None
        self._idle: list[Process] = []
        self._all: set[Process] = set()
        self._is_closed = False

    async def compile(self, trial: CompileRequest, timeout_s: float, client: str = "") -> str:
        """The grammar. Raises GrammarError with the library's reason, CompileLimitExceeded or CompilerBusy."""
        tried: CompileResult | None = None
        if timeout_s > _FAST_LANE_S:
            tried = await self._in_lane(self._fast_lane, trial, _FAST_LANE_S, client)
        if tried is None:
            tried = await self._in_lane(self._slow_lane, trial, timeout_s, client)
        if tried is None:
            raise CompileLimitExceeded(f"not compiled within {timeout_s:g} s")
        if tried.error is not None:
            raise GrammarError(tried.error)
        return tried.grammar

    async def close(self) -> None:
        """End all processes; what waits for one gets CompilerBusy."""
        self._is_closed = True
        if self._spare is not None:
            self._spare.cancel()
        for process in tuple(self._all):
            await self._end(process)

    def _is_suspect(self, client: str, trial: CompileRequest) -> bool:
        overdue = self._overdue.get(client)
        if overdue is None:
            return False
        if overdue.until_s < _now_s():
            del self._overdue[client]
            return False
        is_long = len(overdue.shapes) >= _MANY_SHAPES and len(trial.text) >= overdue.least_size
        return is_long or _shape_of(trial) in overdue.shapes

    def _note_overdue(self, client: str, trial: CompileRequest) -> None:
        if client not in self._overdue and len(self._overdue) >= _MAX_CLIENTS:
            self._overdue = {name: one for name, one in self._overdue.items() if one.until_s >= _now_s()}
        overdue = self._overdue.setdefault(client, _SlowGrammars(set(), len(trial.text), 0.0))
        overdue.least_size = min(overdue.least_size, len(trial.text))
        overdue.until_s = _now_s() + _SUSPECT_S
        if len(overdue.shapes) < _MANY_SHAPES:
            overdue.shapes.add(_shape_of(trial))

    async def _in_lane(
        self, places: FairSemaphore, trial: CompileRequest, timeout_s: float, client: str
    ) -> CompileResult | None:
        """None if it took longer, or is believed to, in the quick lane."""
        is_quick = places is self._fast_lane
        if is_quick and self._is_suspect(client, trial):
            return None
        if places.num_waiting(client) >= _MAX_WAITING_PER_CLIENT:
            raise CompilerBusy(f"{_MAX_WAITING_PER_CLIENT} grammars of this client wait to be compiled")
        try:
            async with places.place(client, len(trial.text), _QUEUE_S):
                if is_quick and self._is_suspect(client, trial):  # as is known since it waited
                    return None
                tried = await self._try(trial, timeout_s, is_quick)
                if tried is None and is_quick:
                    self._note_overdue(client, trial)
                return tried
        except TimeoutError:
            raise CompilerBusy("too many grammars are being compiled") from None

    async def _try(self, trial: CompileRequest, timeout_s: float, is_quick: bool) -> CompileResult | None:
        """None if it took longer."""
        for _ in range(2):  # a process may have been ended before it was asked
            process = await self._process(is_quick)
            tried: CompileResult | None = None
            is_overdue = False
            try:
                asking = _ask(process, msgspec.json.encode(trial) + b"\n")
                tried = await _within(asking, timeout_s, process.pid if is_quick else None)
            except TimeoutError:
                is_overdue = True
            finally:
                if tried is None:  # it hangs, or is dead
                    await self._end(process)
                else:
                    self._idle.append(process)
            if is_overdue and is_quick:
                self._want_spare()
            if tried is not None or is_overdue:
                return tried
        raise CompileLimitExceeded("compiling it took more memory than there is for it")

    async def _process(self, is_quick: bool) -> Process:
        """One that has nothing to do, or a new one; the slow lane leaves the last of the former to the quick one."""
        if self._is_closed:
            raise CompilerBusy("the server is shutting down")
        if not self._all:
            self._want_spare()
        while len(self._idle) > (0 if is_quick else 1):
            process = self._idle.pop()
            if process.returncode is None:
                return process
            self._all.discard(process)
        return await self._start()

    def _want_spare(self) -> None:
        """See to it that a process is up for the next quick one, which need not wait for that then."""
        if len(self._idle) < _FAST_LANE_SLOTS and self._spare is None and not self._is_closed:
            self._spare = asyncio.create_task(self._start_spare())

    async def _start_spare(self) -> None:
        try:
            self._idle.append(await self._start())
        except MedhaError:
            pass  # logged; the next caller tries again
        finally:
            self._spare = None

    async def _start(self) -> Process:
        if not self._first_line:
            self._first_line = await asyncio.to_thread(lambda: msgspec.json.encode(self._vocabulary()) + b"\n")
        command = (sys.executable, *COMMAND, str(os.getpid()))
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, limit=_MAX_RESULT_BYTES, env=self._environment
            )
        except OSError as error:  # no descriptor, process or memory to be had just now
            log.error("grammar_process_not_started", extra={"fields": {"reason": str(error)}})
            raise CompilerBusy("no process to compile grammars can be started; try again later") from None
        self._all.add(process)
        tried: CompileResult | None = None
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
            raise CompilerBusy("the process that compiles grammars does not come up; the server's log may say why")
        if tried.error is not None:
            raise GrammarError(tried.error)
        return process

    async def _end(self, process: Process) -> None:
        self._all.discard(process)
        if process.returncode is None:
            with suppress(ProcessLookupError):  # it has ended, and the loop has not heard yet
                process.kill()
        await process.wait()


async def _within(
    asking: Coroutine[Any, Any, CompileResult | None], timeout_s: float, pid: int | None
) -> CompileResult | None:
    """What comes of it; TimeoutError once it took too long: of a process's own time where pid names one."""
    task = asyncio.ensure_future(asking)
    try:
        began_s = None if pid is None else _computed_s(pid)
        for _ in range(1 if began_s is None else _MAX_WAITS):
            await asyncio.wait((task,), timeout=timeout_s)
            if task.done():
                return task.result()
            now_s = None if pid is None else _computed_s(pid)
            if now_s is None or began_s is None or now_s - began_s >= timeout_s:
                break
        raise TimeoutError
    finally:
        task.cancel()


def _computed_s(pid: int) -> float | None:
    """CPU seconds of a process so far; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _shape_of(trial: CompileRequest) -> int:
    # The same with other words and numbers in it has the same shape.
    return hash((trial.kind, _NO_SHAPE.sub("", trial.text)))


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _ask(process: Process, line: bytes) -> CompileResult | None:
    """Its result; None if it has ended instead."""
    assert process.stdin is not None and process.stdout is not None
    if process.stdin.is_closing():
        return None  # uvloop would raise RuntimeError: the pipe's end has been heard of, the process's not yet
    try:
        process.stdin.write(line)
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        return None
    answer = await process.stdout.readline()
    return msgspec.json.decode(answer, type=CompileResult) if answer else None
