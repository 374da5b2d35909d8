"""The simulation of what a server was asked in a stretch."""

from __future__ import annotations

from dataclasses import replace

from experiments.lib.recording_runtime import RecordingSimRuntime
from experiments.lib.served_log import ServedLog
from experiments.simulator_against_engine.log import Calibration
from megatron_medha.core.batch import Batch
from megatron_medha.core.loop import serve
from megatron_medha.core.scheduling.scheduler import Scheduler


def simulate(log: ServedLog, calibration: Calibration, meant_s: dict[int, float]) -> dict[int, float]:
    """TTFT by prompt length as the client would see it.

    meant_s: when the client meant to send each prompt of a stretch, before and after which the server was idle. Of the
    log are used what clients asked of each request, and of what was before the stretch what the scheduler had learnt.
    """
    arrivals = [
        replace(log.arrivals[length][1], request_id=f"p{length}", arrival_s=at_s + calibration.front_in_s)
        for length, at_s in meant_s.items()
    ]
    steps = calibration.steps
    world = RecordingSimRuntime(arrivals, lambda batch: steps.whole_s(batch, batch.created_s), outcome=steps.completed)
    serve(_scheduler_at(log, min(meant_s.values())), world)
    return {
        length: world.records[f"p{length}"].token_times_s[0] + calibration.front_out_s - at_s
        for length, at_s in meant_s.items()
    }


def _scheduler_at(log: ServedLog, at_s: float) -> Scheduler:
    """The server's own, as it was at a moment when nothing ran."""
    scheduler = log.setup.build()
    for record in log.records:
        if record.now_s >= at_s:
            break
        if isinstance(record.entry, Batch):
            scheduler.schedule(record.now_s)
        else:
            scheduler.handle(record.entry, record.now_s)
    assert not scheduler.num_sequences, "something of the stretch before was still running"
    return scheduler
