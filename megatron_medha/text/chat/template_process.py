"""The program that renders chat templates in a process of its own, so that one that does not end can be ended.

What it is sent is the server's own, so it comes pickled. What it answers was made by the checkpoint's template and is
read with care.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec

from megatron_medha.system.libc import set_pdeathsig
from megatron_medha.text.chat.chat_template import ChatTemplate, ChatTemplateError
from megatron_medha.text.chat.whole_chat import render_whole

COMMAND = ("-m", "megatron_medha.text.chat.template_process")
HEADER = struct.Struct("<Q")  # the length of what follows

_MIN_MEMORY_BYTES = 2**28
_MEMORY_PER_BYTE = 32   # of what was sent: a few copies, of four bytes a character where text is not Latin
_MIN_OUTPUT_BYTES = 2**20
_OUTPUT_PER_BYTE = 8
_KILL_MARGIN_S = 1.0    # after the exception: where the interpreter is in the middle of a long computation
_MAX_OPEN_FILES = 64


class RenderJob(NamedTuple):
    """Messages to be rendered."""

    source: str | None
    special_tokens: dict[str, str]
    messages: list[bytes]    # pickled lists, of some messages each
    options: dict[str, Any]  # of ChatTemplate.render, without those in variables
    variables: bytes         # JSON: its tools and extra
    cpu_s: float             # that it may take


class RenderResult(msgspec.Struct, frozen=True, array_like=True):
    """What came of it."""

    text: str = ""
    mapping: str = ""            # see WholeChat
    error: str | None = None     # why there is no text
    place: int | None = None     # of the message that is at fault


class _CpuTimeExceeded(BaseException):
    """Not an Exception: no template's error is like it."""


def main() -> None:
    """Render what comes in until nothing more does."""
    set_pdeathsig(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGPROF, _stop)
    # Templates reach no file; should one find a way, it finds little.
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    template: ChatTemplate | None = None
    takes_parts = False
    with socket.socket(fileno=os.dup(0)) as connection, connection.makefile("rb") as jobs:
        while header := jobs.read(HEADER.size):
            num_bytes = HEADER.unpack(header)[0]
            job: RenderJob = pickle.loads(jobs.read(num_bytes))
            try:
                if template is None or (template.source, template.special_tokens) != (job.source, job.special_tokens):
                    template, takes_parts = ChatTemplate(job.source, job.special_tokens), False
                rendered = _rendered(template, job, num_bytes, takes_parts)
            except ChatTemplateError as error:
                rendered = RenderResult(error=str(error), place=error.place)
            takes_parts = takes_parts or rendered.mapping.endswith("parts")
            answer = msgspec.msgpack.encode(rendered)
            connection.sendall(HEADER.pack(len(answer)) + answer)


def _rendered(template: ChatTemplate, job: RenderJob, num_bytes: int, takes_parts: bool) -> RenderResult:
    _limit(resource.RLIMIT_DATA, _data_bytes() + _MIN_MEMORY_BYTES + _MEMORY_PER_BYTE * num_bytes)
    # The exception comes between two steps of the interpreter; where one takes for ever, the kernel ends the process.
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + job.cpu_s + _KILL_MARGIN_S))
    try:
        signal.setitimer(signal.ITIMER_PROF, job.cpu_s)
        try:
            messages = [message for some in job.messages for message in pickle.loads(some)]
            options = {**job.options, **json.loads(job.variables)}
            whole = render_whole(template, messages, takes_parts=takes_parts, **options)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            _limit(resource.RLIMIT_CPU, None)
    except _CpuTimeExceeded:
        raise ChatTemplateError(f"the chat template has not ended after {job.cpu_s:.1f} s") from None
    except RecursionError:
        raise ChatTemplateError("the messages are nested too deeply") from None
    except MemoryError:
        raise ChatTemplateError("the chat template uses too much memory") from None
    text = whole.text.encode("utf-8", "replace").decode()
    if len(text) > _MIN_OUTPUT_BYTES + _OUTPUT_PER_BYTE * num_bytes:
        raise ChatTemplateError(f"the chat template writes {len(text)} characters, far more than the messages have")
    return RenderResult(text, whole.mapping)


def _limit(kind: int, most: int | None) -> None:
    _, hard = resource.getrlimit(kind)
    wanted = hard if most is None or (hard != resource.RLIM_INFINITY and most > hard) else most
    resource.setrlimit(kind, (wanted, hard))


def _stop(number: int, frame: FrameType | None) -> None:
    raise _CpuTimeExceeded


def _data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
