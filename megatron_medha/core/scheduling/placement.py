"""On which of several replicas a request runs: the one that is predicted to be done with its prompt first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# However much of each step decodes take, a prefill gets on (prefill_packer.py); more would only be noise here.
_MAX_DECODE_SHARE = 0.9


class ReplicaLoad(NamedTuple):
    """What a replica has before it, by its own cost model, when a request comes in."""

    is_ready: bool
    remaining_prefill_s: float  # of the prompts it has
    prompt_s: float             # of this prompt, alone
    decode_share: float         # of each step's time budget that its decodes take


def predicted_finish_s(load: ReplicaLoad) -> float:
    """Seconds until the replica has this prompt's first token, all earlier prompts computed before it."""
    return (load.remaining_prefill_s + load.prompt_s) / (1.0 - min(load.decode_share, _MAX_DECODE_SHARE))


def choose_replica(replicas: Sequence[ReplicaLoad]) -> int:
    """The index of the replica to run on; ties go to the lowest. Those that are not ready count only if none is."""
    return min(
        range(len(replicas)),
        key=lambda index: (not replicas[index].is_ready, predicted_finish_s(replicas[index]), index),
    )
