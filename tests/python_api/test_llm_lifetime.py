"""An LLM ends without a trace: from scripts, notebooks and tests, closed or not, with Ctrl-C, over real processes."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

import megatron_medha
from megatron_medha import LLM, SamplingParams
from tests.python_api.child_processes import child_processes

FIVE = SamplingParams(max_tokens=5, ignore_eos=True)
JSON = {"type": "json_object"}


def script(text: str, options: dict[str, Any]) -> list[str]:
    given = {key: str(value) for key, value in options.items()}
    return [sys.executable, "-c", f"from megatron_medha import *\nOPTIONS = {given!r}\n{text}"]


def traces() -> tuple[set[str], set[str], int]:
    """Threads, files in the temporary folder, open descriptors."""
    gc.collect()
    names = {thread.name for thread in threading.enumerate()}
    folders = {path.name for path in Path(tempfile.gettempdir()).iterdir()}
    return names, folders, len(os.listdir("/proc/self/fd"))


def test_two_after_one_another_leave_no_process_thread_descriptor_or_folder(
    simulated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use() -> None:
        llm = LLM(**simulated)
        llm.generate(["hello", "world"], FIVE, use_tqdm=False)
        llm.chat([{"role": "user", "content": "hello"}], FIVE, use_tqdm=False)
        llm.generate("hello", SamplingParams(max_tokens=5, response_format=JSON), use_tqdm=False, on_error="return")
        llm.close()

    use()  # what is made once for the process, such as the reader of grammars
    before, processes = traces(), set(child_processes())
    use()
    use()
    after = traces()
    assert after[0] <= before[0] and after[1] <= before[1] and after[2] <= before[2]
    assert set(child_processes()) <= processes


def test_one_that_nobody_holds_any_more_is_closed(simulated: dict[str, Any]) -> None:
    llm = LLM(**simulated)
    thread = llm._local._thread
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_it_works_where_an_event_loop_runs_already_as_in_a_notebook(llm: LLM) -> None:
    async def cell() -> int:
        return len(llm.generate("hello", FIVE, use_tqdm=False)[0].outputs[0].token_ids)

    assert asyncio.run(cell()) == 5


def test_a_script_may_end_without_close(simulated: dict[str, Any]) -> None:
    text = "llm = LLM(**OPTIONS)\nprint(len(llm.generate('hello', SamplingParams(max_tokens=3), use_tqdm=False)))"
    done = subprocess.run(script(text, simulated), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_script_may_fail_in_the_middle_of_a_stream(simulated: dict[str, Any]) -> None:
    text = """
llm = LLM(**OPTIONS)
stream = llm.stream("hello", SamplingParams(max_tokens=100_000, ignore_eos=True))
next(stream)
raise SystemExit(7)
"""
    done = subprocess.run(script(text, simulated), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (7, "")


def test_ctrl_c_ends_a_script_and_the_requests_of_its_call(simulated: dict[str, Any]) -> None:
    text = """
import threading
with LLM(**OPTIONS) as llm:
    threading.Thread(target=lambda: (next(llm.stream("hello")), print("running", flush=True))).start()
    try:
        llm.generate(["hello"] * 3, SamplingParams(max_tokens=100_000, ignore_eos=True), use_tqdm=False)
    except KeyboardInterrupt:
        print(len(llm.generate("hello", SamplingParams(max_tokens=3), use_tqdm=False)), flush=True)
        raise
"""
    process = subprocess.Popen(script(text, simulated), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT, err
    assert out == "1\n"


def test_a_forked_child_does_not_close_it(llm: LLM) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            llm.close()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    # The finalizer of this process is its own.
    assert len(llm.generate("hello", FIVE, use_tqdm=False)) == 1


def test_nothing_heavy_is_imported(simulated: dict[str, Any]) -> None:
    text = """
import json, sys
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
LLM(**OPTIONS).generate("hello", use_tqdm=False)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = subprocess.run(script(text, simulated), capture_output=True, text=True, timeout=120, check=True)
    loaded, used = (set(json.loads(line)) for line in done.stdout.splitlines())
    assert not {"torch", "transformers", "megatron", "numpy"} & used
    assert "megatron_medha" in loaded


def test_the_package_offers_its_api_by_name() -> None:
    for name in megatron_medha.__all__:
        assert getattr(megatron_medha, name) is not None
    assert set(megatron_medha.__all__) <= {*dir(megatron_medha)}
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        megatron_medha.Llm  # noqa: B018
