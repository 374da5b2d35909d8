"""A rank whose native functions and sampling are timed: two looks at the clock around each, written out in the end.

Started by timed_front.py in place of the usual command. $STEP_OVERHEAD_OUT: where to write.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_medha.cluster.messages import RankStep, Shutdown, StepDone
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.worker.main import LoadedRank, main
from megatron_medha.worker.message_inbox import MessageInbox

NATIVE = ("medha_decoder", "medha_attend", "medha_linear", "medha_norm", "medha_activate", "medha_experts")


class Timers:
    """Seconds in each timed function since the last step, and what was noted of all steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps: list[dict[str, Any]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function with its time noted."""

        def call(*args: Any) -> Any:
            started_s = time.perf_counter()
            result = function(*args)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started_s
            return result

        return call


class TimedInbox:
    """Passes messages on; notes when a step came."""

    def __init__(self, inbox: MessageInbox, came: Callable[[RankStep], None]) -> None:
        self._inbox, self._came = inbox, came

    def wait(self) -> RankStep | Shutdown | None:
        """See MessageInbox."""
        return self._note(self._inbox.wait())

    def poll(self) -> RankStep | Shutdown | None:
        """See MessageInbox."""
        return self._note(self._inbox.poll())

    def _note(self, message: RankStep | Shutdown | None) -> RankStep | Shutdown | None:
        if isinstance(message, RankStep):
            self._came(message)
        return message


def load(config: RankConfig, progress: Callable[[str, float], None]) -> LoadedRank:
    """The usual rank, its library's functions replaced by timed ones before anything takes them from it."""
    from megatron_medha.kernels.native_build import native_library, native_target
    from megatron_medha.worker.startup.load import load_rank
    from megatron_medha.worker.step_loop import run_steps

    timers = Timers()
    # Kept by argument, as they are asked for: three objects of one library.
    for library in (native_library(), native_library(None), native_library(native_target())):
        for name in NATIVE:
            function = getattr(library, name, None)
            if function is not None:
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
                setattr(library, name, timers.timed(name, function))
    rank, ready = load_rank(config, progress)
    for name in ("choose", "choose_greedy"):
        setattr(rank._sampler, name, timers.timed("sampling", getattr(rank._sampler, name)))

    def serve(inbox: MessageInbox, answer: Callable[[StepDone], None]) -> None:
        known: dict[int, RankStep] = {}

        def came(step: RankStep) -> None:
            known[step.batch_id] = step

        def answer_timed(done: StepDone) -> None:
            answer(done)
            step = known.pop(done.batch_id)
            num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
            timers.steps.append(
                {
                    "chunks": len(step.chunks),
                    "tokens": num_tokens,
                    "rank_s": done.duration_s,  # also what it computed before it was asked
                    "kernels": dict(timers.seconds),
                }
            )
            timers.seconds.clear()

        run_steps(rank, TimedInbox(inbox, came), answer_timed)
        Path(os.environ["STEP_OVERHEAD_OUT"], "rank.json").write_text(json.dumps(timers.steps))

    return LoadedRank(serve, ready, rank.prepare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load))
