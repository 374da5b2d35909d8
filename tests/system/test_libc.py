"""A process that does not outlive the one that started it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PARENT = """
import os, subprocess, sys
from functools import partial
from megatron_medha.system.libc import set_pdeathsig

child = "import signal; print('here', flush=True); signal.pause()"
subprocess.Popen([sys.executable, "-c", child], preexec_fn=partial(set_pdeathsig, os.getpid())).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot be asked for it")
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"here\n"
        parent.send_signal(signal.SIGKILL)
        # The pipe's last writer is the child: its end comes when that has gone, and this hangs if it stays.
        assert parent.stdout.read() == b""
