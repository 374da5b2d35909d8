"""Plays one random schedule on a layout, and compares every log-probability with the lone run of its sequence."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from megatron_medha.bits.lone_run import BitDifference, differences, lone_run, sequences_of
from megatron_medha.bits.operation_trace import first_difference, record_operations
from megatron_medha.bits.play import Place, Play
from megatron_medha.bits.random_schedule import RandomSchedule, random_case
from megatron_medha.core.layout import ParallelLayout

_SHARE_OF_PROMPTS = 0.3  # that ask for log-probabilities; these read nothing from the prefix cache
_COUNTED = ("hits", "preempted", "aborts", "steps")


class BitResult(NamedTuple):
    """What a schedule has shown."""

    num_positions: int
    num_other: int     # positions of which a log-probability has other bits
    counts: dict[str, int]
    first: str = ""    # the first position that differs, and the first operation


def check_schedule(seed: int, place: Place, vocab_size: int, *, names_operation: bool) -> BitResult:
    """One schedule. names_operation: play it once more, where bits differ, to find the operation they part at."""
    case = random_case(seed, kvp=place.layout.kvp, vocab_size=vocab_size, share_of_prompts=_SHARE_OF_PROMPTS)
    play = Play(case, place, has_cache=True).run()
    lone = lone_run(sequences_of(play), place._replace(layout=ParallelLayout()), case.kv)
    num_positions, num_other, found = differences(play, lone)
    counts = {what: play.counts[what] for what in _COUNTED}
    if not found:
        return BitResult(num_positions, num_other, counts)
    first = found[0]
    said = (
        f"{first.request_id}, token {first.position}: {first.found.logprob!r} and {first.expected.logprob!r} alone"
        if first.found.logprob != first.expected.logprob
        else f"{first.request_id}, token {first.position}: one of the best {len(first.found.top)}"
    )
    operation = first_operation(case, place, play, first) if names_operation else ""
    return BitResult(num_positions, num_other, counts, f"{said}{'; ' if operation else ''}{operation}")


def first_operation(case: RandomSchedule, place: Place, play: Play, difference: BitDifference) -> str:
    """Play it again, noting what every operation gives for this request."""
    prepare = partial(record_operations, request_id=difference.request_id)
    sequence = {difference.request_id: sequences_of(play)[difference.request_id]}
    found = Play(case, place, has_cache=True, prepare=prepare).run().notes
    alone = lone_run(sequence, place._replace(layout=ParallelLayout()), case.kv, prepare).notes
    operation = first_difference(found, alone, difference.position - 1)
    return f"first in {operation}" if operation else "in the output layer, or in a part that only some ranks have"
