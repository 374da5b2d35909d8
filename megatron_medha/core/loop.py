"""The scheduling loop, over real ranks and in simulations."""

from __future__ import annotations

from megatron_medha.core.ports import Observer, Runtime, SchedulerProtocol


def serve(decisions: SchedulerProtocol, runtime: Runtime, observers: tuple[Observer, ...] = ()) -> None:
    """Run until the runtime has no more events: events go to the scheduler, its batches to the runtime."""
    while (event := runtime.next_event()) is not None:
        now_s = runtime.now_s()
        outputs = decisions.handle(event, now_s)
        for observer in observers:
            observer.handled(event, outputs, now_s)
        for output in outputs:
            runtime.emit(output)
        while runtime.has_room() and (batch := decisions.schedule(now_s)) is not None:
            for observer in observers:
                observer.scheduled(batch, now_s)
            runtime.submit(batch)
