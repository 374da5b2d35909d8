"""Which prompts are prefilled together, and on how many instances: LoongServe's dynamic program."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from megatron_medha.sim.baselines.ring_cost import RingCost


class InstanceRun(NamedTuple):
    """A run of the prompts, and a run of the instances that prefill them in one pass."""

    first_prompt: int
    num_prompts: int
    first_instance: int
    num_instances: int
    prefill_s: float


def partition(cost: RingCost, lengths: Sequence[int], room: Sequence[int]) -> list[InstanceRun]:
    """Cut prompts and instances into runs with the least sum of prefill time per prompt token.

    lengths: of the prompts, longest first. room: tokens of KV that each instance can take. A run's prompts must fit
    into its instances. The sum counts each prompt with its run's time divided by its own length, LoongServe's
    normalised input latency (arXiv:2404.09526, section 5). Empty if they do not fit at all.
    """
    num_prompts, num_instances = len(lengths), len(room)
    tokens, squares, inverses, rooms = [0], [0.0], [0.0], [0]
    for length in lengths:
        tokens.append(tokens[-1] + length)
        squares.append(squares[-1] + float(length) ** 2)
        inverses.append(inverses[-1] + 1.0 / length)
    for free in room:
        rooms.append(rooms[-1] + free)
    best = [[inf] * (num_instances + 1) for _ in range(num_prompts + 1)]
    last: dict[tuple[int, int], InstanceRun] = {}
    best[0] = [0.0] * (num_instances + 1)
    for end in range(1, num_prompts + 1):
        for begin in range(end):
            count = tokens[end] - tokens[begin]
            weight = inverses[end] - inverses[begin]
            for degree in range(1, num_instances + 1):
                seconds = cost.prefill_s(degree, count, squares[end] - squares[begin], end - begin)
                for top in range(degree, num_instances + 1):
                    total = best[begin][top - degree] + seconds * weight
                    if total < best[end][top] and count <= rooms[top] - rooms[top - degree]:
                        best[end][top] = total
                        last[end, top] = InstanceRun(begin, end - begin, top - degree, degree, seconds)
    top = min(range(num_instances + 1), key=lambda index: best[num_prompts][index])
    if best[num_prompts][top] == inf:
        return []
    shares: list[InstanceRun] = []
    end = num_prompts
    while end:
        share = last[end, top]
        shares.append(share)
        end, top = share.first_prompt, share.first_instance
    return shares
