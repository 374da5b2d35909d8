"""`medha serve` with its scheduler timed and with timed ranks. $STEP_OVERHEAD_OUT: the folder to write to."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from functools import partial, wraps
from pathlib import Path
from typing import Any

from megatron_medha.cli.medha import main
from megatron_medha.cli.parts import serve_parts
from megatron_medha.cluster.rank_engine import local_ranks
from megatron_medha.core.scheduling.scheduler import Scheduler

_batches: list[dict[str, Any]] = []
_since_last = 0.0


def watch() -> None:
    """Put timers around the scheduler, and timed ranks in place of the usual ones."""
    handle, schedule = Scheduler.handle, Scheduler.schedule

    @wraps(handle)
    def timed_handle(self: Scheduler, *args: Any) -> Any:
        global _since_last
        started_s = time.perf_counter()
        result = handle(self, *args)
        _since_last += time.perf_counter() - started_s
        return result

    @wraps(schedule)
    def timed_schedule(self: Scheduler, *args: Any) -> Any:
        global _since_last
        started_s = time.perf_counter()
        batch = schedule(self, *args)
        ended_s = time.perf_counter()
        _since_last += ended_s - started_s
        if batch is not None:
            _batches.append(
                {"at_s": ended_s, "chunks": len(batch.chunks), "tokens": batch.num_tokens, "scheduler_s": _since_last}
            )
            _since_last = 0.0
        return batch

    Scheduler.handle, Scheduler.schedule = timed_handle, timed_schedule  # type: ignore[method-assign]
    command = (sys.executable, "-m", "experiments.step_overhead.timed_rank")
    serve_parts.local_ranks = partial(local_ranks, command=command)  # type: ignore[assignment]
    out = Path(os.environ["STEP_OVERHEAD_OUT"], "front.json")
    atexit.register(lambda: out.write_text(json.dumps(_batches)))


if __name__ == "__main__":
    watch()
    sys.exit(main(sys.argv[1:]))
