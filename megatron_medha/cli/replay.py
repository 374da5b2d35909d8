"""`medha replay LOG`: feeds a recorded run's inputs to a fresh scheduler and compares every batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_medha.core.errors import ConfigError
from megatron_medha.sim.system import build_scheduler, recorded_setup
from megatron_medha.stats.decision_log import ReplayError, read_log, replay

USAGE = """\
usage: medha replay LOG

Rebuilds the scheduler from the log's first line, gives it every recorded input at its recorded time, and compares
the batches it forms with the recorded ones. Exit code 0: all are equal; 1: the first that differs is printed.

example:
  medha serve checkpoint=checkpoints/tiny tracking.decision_log=decisions.jsonl
  medha replay decisions.jsonl
"""


def run(words: Sequence[str]) -> int:
    """Replay one log."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if len(words) > 1:
        raise ConfigError(f"{words[1]}: one log at a time; medha replay LOG")
    path = Path(words[0])
    try:
        stream = path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a decision log") from error
    with stream:
        try:
            header, records = read_log(stream)
            setup = recorded_setup(header)
            num_batches = replay(records, build_scheduler(setup))
        except (ReplayError, UnicodeDecodeError) as error:
            raise ReplayError(f"{path}: {error}") from error
    print(f"{num_batches:,} batches, all equal: policy {setup.config.policy}, model {setup.shape.name}")
    return 0
