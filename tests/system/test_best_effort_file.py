"""A log that cannot be written any more ends; the server does not."""

from __future__ import annotations

import errno
import io
import logging
import os
from pathlib import Path

import pytest

from megatron_medha.system.best_effort_file import BestEffortFile


class FullDisk(io.StringIO):
    """Takes nothing, neither when written to nor when closed."""

    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_written_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log"
    file = BestEffortFile.open(path, by_line=True)
    file.write("one\n")
    assert path.read_text() == "one\n"
    file.write("two")
    file.close()
    assert path.read_text() == "one\ntwo"


def test_a_full_disk_is_logged_once_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    file = BestEffortFile(Path("log.jsonl"), FullDisk())
    with caplog.at_level(logging.ERROR):
        file.write("one\n")
        file.write("two\n")
        file.close()
    assert [record.getMessage() for record in caplog.records] == [
        "file_write_failed path=log.jsonl reason='No space left on device'"
    ]


def test_a_disk_that_is_full_only_at_the_end_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    file = BestEffortFile(Path("trace.json"), FullDisk())
    with caplog.at_level(logging.ERROR):
        file.close()
    assert "file_write_failed path=trace.json" in caplog.text
