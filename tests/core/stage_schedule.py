"""What the ranks of every stage and kvp index do with a sequence of batches, by their plans: data, carried out here."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.stage_plan import StagePlan, stage_plan


class GroupCoord(NamedTuple):
    """The ranks of one stage and one kvp index."""

    stage: int
    kvp: int

    def __str__(self) -> str:
        return f"stage {self.stage} kvp {self.kvp}"


class OperationKind(Enum):
    """What an operation is."""

    RECEIVE = "receive"    # hidden states from the stage before; waits for them
    SEND = "send"          # hidden states to the next stage; does not wait
    POST = "post"          # partial attention to a kvp peer, and room for its own; does not wait
    MERGE = "merge"        # waits for a kvp peer's partial attention
    COMPUTE = "compute"    # a layer's worth of everything else


class Operation(NamedTuple):
    """One thing a place does."""

    kind: OperationKind
    batch_id: int
    num_tokens: int
    layer: int = 0             # within the stage; POST, MERGE and COMPUTE
    peer: GroupCoord | None = None  # the other end

    def __str__(self) -> str:
        where = "" if self.peer is None else f" <> {self.peer}"
        layer = (
            f" layer {self.layer}"
            if self.kind in (OperationKind.POST, OperationKind.MERGE, OperationKind.COMPUTE)
            else ""
        )
        return f"batch {self.batch_id:<4} {self.kind.value:<8} {self.num_tokens:>6} tokens{layer}{where}"


Schedule = dict[GroupCoord, tuple[Operation, ...]]


def exchanged_tokens(plan: StagePlan, chunks: Sequence[Chunk], kvp_rank: int) -> dict[int, int]:
    """By kvp peer, ascending: query rows whose partial attention goes both ways."""
    exchanged: dict[int, int] = defaultdict(int)
    for ranks, indices in plan.shared:
        for peer in ranks:
            if peer != kvp_rank:
                exchanged[peer] += sum(chunks[index].num_tokens for index in indices)
    return dict(sorted(exchanged.items()))


def operations(batch: Batch, place: GroupCoord, num_stages: int, num_layers: int) -> tuple[Operation, ...]:
    """What a place does with a batch, one operation after the other; num_layers are those of one stage."""
    chunks = batch.chunks_on(place.kvp)
    plan, batch_id = stage_plan(chunks, place.kvp), batch.batch_id
    if not plan.num_tokens:
        return ()
    found = []
    if place.stage > 0:
        found.append(
            Operation(OperationKind.RECEIVE, batch_id, plan.num_tokens, peer=GroupCoord(place.stage - 1, place.kvp))
        )
    peers = [
        (GroupCoord(place.stage, peer), count) for peer, count in exchanged_tokens(plan, chunks, place.kvp).items()
    ]
    for layer in range(num_layers):
        # Everything is posted before anything is waited for: the order in which peers get to it does not matter.
        found += [Operation(OperationKind.POST, batch_id, count, layer, peer) for peer, count in peers]
        found.append(Operation(OperationKind.COMPUTE, batch_id, plan.num_tokens, layer))
        found += [Operation(OperationKind.MERGE, batch_id, count, layer, peer) for peer, count in peers]
    if place.stage < num_stages - 1:
        found.append(
            Operation(OperationKind.SEND, batch_id, plan.num_tokens, peer=GroupCoord(place.stage + 1, place.kvp))
        )
    return tuple(found)


def stream_schedule(batches: Sequence[Batch], *, num_stages: int, kvp: int, num_layers: int = 1) -> Schedule:
    """What every place of a replica does for these batches."""
    return {
        place: tuple(
            operation
            for batch in batches
            for operation in operations(batch, place, num_stages, num_layers)
        )
        for place in (GroupCoord(stage, index) for stage in range(num_stages) for index in range(kvp))
    }


@dataclass(frozen=True, slots=True)
class DryRun:
    """A schedule carried out in virtual time; every COMPUTE takes one unit per layer, everything else none."""

    finished_at: Mapping[GroupCoord, Mapping[int, int]]  # when a place was done with each batch it had work in
    duration: int


def dry_run(schedule: Schedule) -> DryRun:
    """Carry a schedule out, every place at its own pace.

    Raises AssertionError when the two ends of a link disagree, when something sent is never received, or when
    every place waits for another.
    """
    next_operation = dict.fromkeys(schedule, 0)
    clock = dict.fromkeys(schedule, 0)
    finished: dict[GroupCoord, dict[int, int]] = {place: {} for place in schedule}
    # What has been sent on each link and not been taken: (what it is, when it was sent), first in, first out.
    links: dict[tuple[GroupCoord, GroupCoord], deque[tuple[tuple[int, int, int], int]]] = defaultdict(deque)
    is_moving = True
    while is_moving:
        is_moving = False
        for place, todo in schedule.items():
            while next_operation[place] < len(todo):
                operation = todo[next_operation[place]]
                label = (operation.batch_id, operation.layer, operation.num_tokens)
                match operation.kind:
                    case OperationKind.COMPUTE:
                        clock[place] += 1
                    case OperationKind.SEND | OperationKind.POST:
                        assert operation.peer is not None
                        links[place, operation.peer].append((label, clock[place]))
                    case OperationKind.RECEIVE | OperationKind.MERGE:
                        assert operation.peer is not None
                        arrived = links[operation.peer, place]
                        if not arrived:
                            break
                        found, sent_at = arrived.popleft()
                        assert found == label, f"{place} waits for {operation}, {operation.peer} sent {found}"
                        clock[place] = max(clock[place], sent_at)
                finished[place][operation.batch_id] = clock[place]
                next_operation[place] += 1
                is_moving = True
    stuck = [
        f"{place} waits at {todo[next_operation[place]]}"
        for place, todo in schedule.items()
        if next_operation[place] < len(todo)
    ]
    assert not stuck, "deadlock: " + "; ".join(stuck)
    unread = {link: sent for link, sent in links.items() if sent}
    assert not unread, f"sent and never received: {unread}"
    return DryRun(finished, max(clock.values(), default=0))
