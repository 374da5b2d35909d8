"""The stage schedule as data: what every rank receives, computes, exchanges and sends for a sequence of batches.

Every rank works through the same batches in the same order, and for each of them through `stage_plan`. Nothing else
is needed for a pipeline that streams: the next chunk of a prompt may enter stage 0 while the last is in stage 1.
Ranks of one tensor-parallel group do the same, so the schedule names the places of the others: stage and kvp index.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megatron_medha.core.batch import Batch, Chunk


class Place(NamedTuple):
    """A tensor-parallel group's place in a replica."""

    stage: int
    kvp: int

    def __str__(self) -> str:
        return f"stage {self.stage} kvp {self.kvp}"


class SharedChunks(NamedTuple):
    """Chunks of one batch that the same kvp ranks attend to together."""

    kvp_ranks: tuple[int, ...]  # ascending
    indices: tuple[int, ...]    # of the chunks, among those given to `stage_plan`


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What the ranks at one place do with one batch: receive, compute (exchanging in every layer), send, in this order.

    Rows of the packed batch follow `order`: chunks of this kvp rank alone first, then each group of shared ones.
    """

    batch_id: int
    place: Place
    num_tokens: int
    order: tuple[int, ...]                # of the chunks given, by index
    num_alone: int                        # leading entries of `order` that no other kvp rank takes part in
    shared: tuple[SharedChunks, ...]
    exchanged_tokens: Mapping[int, int]   # by kvp peer, ascending: query rows whose partial attention goes both ways
    receives_from: Place | None           # None: the first stage, or nothing to compute
    sends_to: Place | None                # None: the last stage, or nothing to compute


def stage_plan(batch_id: int, chunks: Sequence[Chunk], place: Place, num_stages: int) -> StagePlan:
    """The plan of one place for the chunks its kvp rank takes part in, given in the batch's order.

    Two ranks that share chunks see them in the same relative order, so both ends of every link agree.
    """
    alone: list[int] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    num_tokens = 0
    for index, chunk in enumerate(chunks):
        assert place.kvp in chunk.kvp_ranks, f"{chunk.request_id}: kvp rank {place.kvp} is not of {chunk.kvp_ranks}"
        num_tokens += chunk.num_tokens
        if len(chunk.kvp_ranks) == 1:
            alone.append(index)
        else:
            groups.setdefault(tuple(sorted(chunk.kvp_ranks)), []).append(index)
    exchanged: dict[int, int] = defaultdict(int)
    for ranks, indices in groups.items():
        for peer in ranks:
            if peer != place.kvp:
                exchanged[peer] += sum(chunks[index].num_tokens for index in indices)
    is_idle = not chunks
    return StagePlan(
        batch_id=batch_id,
        place=place,
        num_tokens=num_tokens,
        order=(*alone, *(index for indices in groups.values() for index in indices)),
        num_alone=len(alone),
        shared=tuple(SharedChunks(ranks, tuple(indices)) for ranks, indices in groups.items()),
        exchanged_tokens=dict(sorted(exchanged.items())),
        receives_from=None if is_idle or place.stage == 0 else Place(place.stage - 1, place.kvp),
        sends_to=None if is_idle or place.stage == num_stages - 1 else Place(place.stage + 1, place.kvp),
    )


class Kind(Enum):
    """What an operation is."""

    RECEIVE = "receive"    # hidden states from the stage before; waits for them
    SEND = "send"          # hidden states to the next stage; does not wait
    POST = "post"          # partial attention to a kvp peer, and room for its own; does not wait
    MERGE = "merge"        # waits for a kvp peer's partial attention
    COMPUTE = "compute"    # a layer's worth of everything else


class Operation(NamedTuple):
    """One thing a place does."""

    kind: Kind
    batch_id: int
    num_tokens: int
    layer: int = 0             # within the stage; POST, MERGE and COMPUTE
    peer: Place | None = None  # the other end

    def __str__(self) -> str:
        where = "" if self.peer is None else f" <> {self.peer}"
        layer = f" layer {self.layer}" if self.kind in (Kind.POST, Kind.MERGE, Kind.COMPUTE) else ""
        return f"batch {self.batch_id:<4} {self.kind.value:<8} {self.num_tokens:>6} tokens{layer}{where}"


Schedule = dict[Place, tuple[Operation, ...]]


def operations(plan: StagePlan, num_layers: int) -> tuple[Operation, ...]:
    """A plan, one operation after the other; num_layers are those of one stage."""
    if not plan.num_tokens:
        return ()
    batch_id, found = plan.batch_id, []
    if plan.receives_from is not None:
        found.append(Operation(Kind.RECEIVE, batch_id, plan.num_tokens, peer=plan.receives_from))
    peers = [(Place(plan.place.stage, peer), count) for peer, count in plan.exchanged_tokens.items()]
    for layer in range(num_layers):
        # Everything is posted before anything is waited for: the order in which peers get to it does not matter.
        found += [Operation(Kind.POST, batch_id, count, layer, peer) for peer, count in peers]
        found.append(Operation(Kind.COMPUTE, batch_id, plan.num_tokens, layer))
        found += [Operation(Kind.MERGE, batch_id, count, layer, peer) for peer, count in peers]
    if plan.sends_to is not None:
        found.append(Operation(Kind.SEND, batch_id, plan.num_tokens, peer=plan.sends_to))
    return tuple(found)


def stream_schedule(batches: Sequence[Batch], *, num_stages: int, kvp: int, num_layers: int = 1) -> Schedule:
    """What every place of a replica does for these batches."""
    return {
        place: tuple(
            operation
            for batch in batches
            for operation in operations(
                stage_plan(batch.batch_id, batch.chunks_on(place.kvp), place, num_stages), num_layers
            )
        )
        for place in (Place(stage, index) for stage in range(num_stages) for index in range(kvp))
    }


@dataclass(frozen=True, slots=True)
class DryRun:
    """A schedule carried out in virtual time; every COMPUTE takes one unit per layer, everything else none."""

    finished_at: Mapping[Place, Mapping[int, int]]  # when a place was done with each batch it had work in
    duration: int


def dry_run(schedule: Schedule) -> DryRun:
    """Carry a schedule out, every place at its own pace.

    Raises AssertionError when the two ends of a link disagree, when something sent is never received, or when
    every place waits for another.
    """
    next_operation = dict.fromkeys(schedule, 0)
    clock = dict.fromkeys(schedule, 0)
    finished: dict[Place, dict[int, int]] = {place: {} for place in schedule}
    # What has been sent on each link and not been taken: (what it is, when it was sent), first in, first out.
    links: dict[tuple[Place, Place], deque[tuple[tuple[int, int, int], int]]] = defaultdict(deque)
    is_moving = True
    while is_moving:
        is_moving = False
        for place, todo in schedule.items():
            while next_operation[place] < len(todo):
                operation = todo[next_operation[place]]
                label = (operation.batch_id, operation.layer, operation.num_tokens)
                match operation.kind:
                    case Kind.COMPUTE:
                        clock[place] += 1
                    case Kind.SEND | Kind.POST:
                        assert operation.peer is not None
                        links[place, operation.peer].append((label, clock[place]))
                    case Kind.RECEIVE | Kind.MERGE:
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


def printed(schedule: Schedule) -> str:
    """A schedule as text, place by place."""
    lines = []
    for place, todo in schedule.items():
        lines.append(f"{place}:")
        lines += [f"  {operation}" for operation in todo]
    return "\n".join(lines)
