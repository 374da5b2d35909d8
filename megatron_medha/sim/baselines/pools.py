"""Two pools of instances, one of them kept for short prompts; each is a system of its own."""

from __future__ import annotations

from megatron_medha.core.batch import Arrived, Batch, Completed, Event, Output
from megatron_medha.sim.baselines.elastic import ElasticSystem


class ReservedPools:
    """A scheduler that sends prompts up to a length to one elastic system and all others to another.

    Medha's figure 14: two of eight instances for prompts below 8,192 tokens.
    """

    def __init__(self, short: ElasticSystem, long: ElasticSystem, short_prompt_tokens: int) -> None:
        self._short = short
        self._long = long
        self._short_prompt_tokens = short_prompt_tokens

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See SchedulerProtocol."""
        match event:
            case Arrived(request):
                is_short = request.num_prompt_tokens <= self._short_prompt_tokens
            case Completed():
                is_short = self._short.knows(event.batch_id)
            case _:
                raise AssertionError(f"{event}: in this simulation nobody goes away and no rank is lost")
        return (self._short if is_short else self._long).handle(event, now_s)

    def schedule(self, now_s: float) -> Batch | None:
        """See SchedulerProtocol."""
        return self._short.schedule(now_s) or self._long.schedule(now_s)
