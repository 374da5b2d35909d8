"""T_iso: how long a prompt takes alone on the simulated machine. Deadlines and slowdowns are in units of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from megatron_medha.core.batch import Batch, Completed, Event, Output
from megatron_medha.core.loop import serve
from megatron_medha.core.ports import SchedulerProtocol
from megatron_medha.core.request import Request
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.sim.sim_world import SimRuntime
from megatron_medha.workload.request_feed import OpenLoop

_FIRST_TOKENS = 32
_GROWTH = 1.5  # from one length to the next among those that are one step


class IsolatedTimes:
    """TTFT by prompt length.

    The longest prompt is simulated alone. The chunks it begins with are those of any shorter prompt, so the moments
    at which they complete are the TTFT of prompts that end there. Prompts of a single step are simulated one by one.

    build: a fresh system, the same whichever system is under test, so that all are held to the same deadlines.
    truth: what its batches take, without noise.
    api_server_s: see SimRuntime.
    """

    def __init__(
        self,
        build: Callable[[], SchedulerProtocol],
        truth: Callable[[Batch], StepTimes],
        pipeline: Callable[[], Pipeline],
        max_tokens: int,
        api_server_s: float = 0.0,
    ) -> None:
        def milestones(num_tokens: int) -> list[tuple[int, float]]:
            world = _OnePromptRuntime(num_tokens, pipeline(), truth, api_server_s)
            serve(build(), world)
            assert world.milestones[-1][0] == num_tokens, f"a prompt of {num_tokens} tokens alone got no first token"
            return world.milestones

        longest = milestones(max_tokens)
        points: list[tuple[int, float]] = []
        num_tokens = _FIRST_TOKENS
        while num_tokens < longest[0][0]:
            points.append(milestones(num_tokens)[-1])
            num_tokens = int(num_tokens * _GROWTH)
        points += longest
        self._tokens = [tokens for tokens, _ in points]
        self._seconds = [seconds for _, seconds in points]

    def __call__(self, num_tokens: int) -> float:
        """Seconds to the first token of a prompt of so many tokens, at most the longest that was simulated."""
        index = bisect_left(self._tokens, num_tokens)
        if index == 0:
            return self._seconds[0]
        x0, x1 = self._tokens[index - 1], self._tokens[index]
        y0, y1 = self._seconds[index - 1], self._seconds[index]
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)


class _OnePromptRuntime(SimRuntime):
    """A world with one request of one output token, and how far its prefill was when."""

    def __init__(
        self, num_tokens: int, pipeline: Pipeline, truth: Callable[[Batch], StepTimes], api_server_s: float
    ) -> None:
        request = Request(request_id="alone", num_prompt_tokens=num_tokens, max_output_tokens=1, arrival_s=0.0)
        super().__init__(OpenLoop([request]), pipeline, api_server_s)
        self._truth = truth
        self._ends: dict[int, int] = {}
        self.milestones: list[tuple[int, float]] = []

    def next_event(self) -> Event | None:
        """See Runtime."""
        event = super().next_event()
        if isinstance(event, Completed):
            self.milestones.append((self._ends.pop(event.batch_id), self._now_s))
        return event

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        self._ends[batch.batch_id] = batch.chunks[0].start + batch.chunks[0].num_tokens
        self.enter(batch, self._truth(batch))

    def emit(self, output: Output) -> None:
        """See Runtime."""
