"""A rank's main loop: takes steps, computes them in order, sends results."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.cluster.messages import RankStep, Shutdown, StepDone
from megatron_medha.core.errors import RankError
from megatron_medha.worker.message_inbox import MessageInbox
from megatron_medha.worker.rank import Rank


def run_steps(rank: Rank, inbox: MessageInbox, answer: Callable[[StepDone], None]) -> None:
    """Compute steps until Shutdown; steps that arrived before it are computed first, because other ranks wait for them.

    A step that overtakes another is answered before it. While the API server processes a result and forms the next
    step, the rank runs ahead with decodes that are certain.
    """
    is_over = False

    def take_arrived() -> None:
        nonlocal is_over
        while not is_over and (message := inbox.poll()) is not None:
            is_over = not _announced(rank, message)

    def take_next() -> None:
        nonlocal is_over
        is_over = not _announced(rank, inbox.wait())
        if is_over:
            raise RankError("the API server is gone, or has ended, before a step that other ranks compute came here")

    rank.take_arrived, rank.take_next, rank.take_done = take_arrived, take_next, answer
    while True:
        take_arrived()
        if rank.num_queued_steps:
            done = rank.compute()
            if rank.answers:
                answer(done)
        elif is_over:
            rank.finish()
            return
        elif rank.run_ahead():
            continue  # a message may have arrived
        else:
            is_over = not _announced(rank, inbox.wait())


def _announced(rank: Rank, message: RankStep | Shutdown | None) -> bool:
    """Queue a step on the rank; False if the message ends the loop."""
    match message:
        case RankStep():
            rank.announce(message)
            return True
        case Shutdown() | None:
            return False
