"""The order of a rank's days: take steps as they come, compute them in that order, answer."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.cluster.messages import RankStep, Shutdown, StepDone
from megatron_medha.worker.message_inbox import MessageInbox
from megatron_medha.worker.rank import Rank


def run_steps(rank: Rank, inbox: MessageInbox, answer: Callable[[StepDone], None]) -> None:
    """Serve until told to stop; steps that came before are computed first, as other ranks count on it.

    While the API server takes up an answer and forms the next step, the rank computes the decodes that surely follow.
    """
    is_over = False

    def take_arrived() -> None:
        nonlocal is_over
        while not is_over and (message := inbox.poll()) is not None:
            is_over = not _announced(rank, message)

    # Only a later stage gains by knowing of the next step while it computes one.
    rank.before_layer = take_arrived if rank.receives else None
    while True:
        take_arrived()
        if rank.num_queued_steps:
            done = rank.compute()
            if rank.answers:
                answer(done)
        elif is_over:
            return
        elif rank.run_ahead():
            continue  # the API server may have said something meanwhile
        else:
            is_over = not _announced(rank, inbox.wait())


def _announced(rank: Rank, message: RankStep | Shutdown | None) -> bool:
    """Tell the rank of a step; False when the message ends its work."""
    match message:
        case RankStep():
            rank.announce(message)
            return True
        case Shutdown() | None:
            return False
