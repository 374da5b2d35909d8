"""At which points of a step that may be held another one is computed first: the same on all ranks that share them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from math import ceil

from megatron_medha.cluster.messages import RankStep
from megatron_medha.core.layout import Coord, ParallelLayout
from megatron_medha.parallel.point_board import Decision, PointBoard, end_of, place_of
from megatron_medha.parallel.shm_channel import pause


def may_pass(overtaking: RankStep, held: RankStep) -> bool:
    """Whether a step may be computed at a point of another one; see Batch."""
    oldest = overtaking.overtakes
    return held.may_be_held and oldest is not None and oldest <= held.batch_id < overtaking.batch_id


_LOOK_S = 4e-3   # between two looks while the library computes; points are to be some 10 ms apart
_BLOCK_S = 8e-3  # of a layer, as predicted for all that it does
LEAST_ROWS = 512  # of a block, in the longest chunk


def num_blocks_of(step: RankStep, num_layers: int) -> int:
    """Of the rows of each layer (HeldStep), the same on all ranks of the step. num_layers: of the whole model."""
    return max(1, min(ceil(step.predicted_s / num_layers / _BLOCK_S), step.longest_chunk // LEAST_ROWS))


class HoldPoints:
    """One rank's part in the decisions of its pipeline stage."""

    look_interval_s = _LOOK_S

    def __init__(self, rank: int, layout: ParallelLayout, board: PointBoard | None) -> None:
        """board: None where not all ranks share memory; a rank alone needs none."""
        coord = layout.coord_of(rank)
        self.is_alone = layout.tp * layout.kvp == 1  # on its stage
        self.can_hold = board is not None or layout.world_size == 1
        self._rank, self._layout, self._coord, self._board = rank, layout, coord, board
        self._before = [  # ranks of the stage before
            layout.rank_of(Coord(tp, kvp, coord.spp - 1, coord.dp))
            for tp in range(layout.tp)
            for kvp in range(layout.kvp)
            if coord.spp > 0
        ]
        self._num_taken = [0] * layout.kvp  # decisions, by the leader's kvp index

    def leads(self, step: RankStep) -> bool:
        """Whether this rank decides at the step's points."""
        return self._rank == self._leader(step)

    def has_found(self, point: int, held: RankStep, queued: Callable[[], Iterable[RankStep]]) -> bool:
        """Whether a step is to be computed before this point of another one; see `at`."""
        if self.leads(held):
            return any(may_pass(step, held) and self._has_come(step) for step in queued())
        return self._next_decision(place_of(held.batch_id, point), held) is not None

    def before(self, point: int, held: RankStep, queued: Callable[[], Iterable[RankStep]]) -> Iterator[int]:
        """`at`, on the way to that point: there may be more before it is reached, and nobody waits."""
        place = place_of(held.batch_id, point)
        if self.leads(held):
            yield from self._led(place, held, queued, False)
            return
        while (batch_id := self._next_decision(place, held)) is not None:
            self._num_taken[held.leader] += 1
            yield batch_id

    def at(
        self, point: int, held: RankStep, queued: Callable[[], Iterable[RankStep]], is_first: bool
    ) -> Iterator[int]:
        """Batch ids of steps to be computed at this point of a step, each before the next is asked for.

        queued: steps that this rank knows of and has not computed; looks for new ones first. is_first: the step has
        not begun, and does not before its hidden states have been sent.
        """
        place = place_of(held.batch_id, point)
        if not self.leads(held):
            yield from self._followed(place, held)
            return
        yield from self._led(place, held, queued, is_first)
        if self._board is not None:
            self._board.reached(place)

    def at_end(self, held: RankStep) -> Iterator[int]:
        """The same when the rank has computed its part of the step, if it has one: until its leader has ended it.

        It must not go on to a later step: what overtakes may be shared with a rank that holds this one, and so may the
        later step, in the other order.
        """
        if not self.leads(held):
            yield from self._followed(end_of(held.batch_id), held)
        elif self._board is not None:
            self._board.reached(end_of(held.batch_id))

    def computed(self, step: RankStep) -> None:
        """Its hidden states, if there is a next stage, are on their way there."""
        if self._board is not None:
            self._board.passed_on(step.batch_id, is_overtaking=step.overtakes is not None)

    def _led(
        self, place: int, held: RankStep, queued: Callable[[], Iterable[RankStep]], is_first: bool
    ) -> Iterator[int]:
        started_s = time.monotonic()
        while True:
            found = [step for step in queued() if may_pass(step, held) and self._has_come(step)]
            if found:
                if self._board is not None:
                    self._board.decide(Decision(place, found[0].batch_id))
                yield found[0].batch_id
                started_s = time.monotonic()
            elif not is_first or self._has_come(held):
                break
            else:
                pause(time.monotonic() - started_s)

    def _followed(self, place: int, held: RankStep) -> Iterator[int]:
        assert self._board is not None
        board, leader = self._board, self._leader(held)
        started_s = time.monotonic()
        while True:
            is_past = board.place_reached(leader) >= place  # read first: what was decided before is then there
            while (batch_id := self._next_decision(place, held)) is not None:
                self._num_taken[held.leader] += 1
                yield batch_id
                started_s = time.monotonic()
            if is_past:
                return
            pause(time.monotonic() - started_s)

    def _next_decision(self, place: int, held: RankStep) -> int | None:
        """The next step that its leader has decided on up to that place."""
        assert self._board is not None
        leader, num_taken = self._leader(held), self._num_taken[held.leader]
        if num_taken >= self._board.num_decisions(leader):
            return None
        decision = self._board.decision(leader, num_taken)
        return None if decision.place > place else decision.batch_id

    def _has_come(self, step: RankStep) -> bool:
        """Whether every rank of the stage before has sent its hidden states."""
        if self._board is None:
            return True
        is_overtaking = step.overtakes is not None
        return all(
            self._board.newest_passed_on(rank, is_overtaking=is_overtaking) >= step.batch_id for rank in self._before
        )

    def _leader(self, step: RankStep) -> int:
        assert 0 <= step.leader < self._layout.kvp, f"batch {step.batch_id}: kvp rank {step.leader} leads"
        return self._layout.rank_of(Coord(0, step.leader, self._coord.spp, self._coord.dp))


class StepPoints:
    """The points of one step. Their numbers are the same on all its ranks, also where some have no rows in a block.

    A step that goes first at a look does so at the next point that is agreed on: for the order of what ranks do
    together that is the same.
    """

    def __init__(
        self,
        points: HoldPoints,
        step: RankStep,
        queued: Callable[[], Iterable[RankStep]],
        overtake: Callable[[int], None],
    ) -> None:
        """queued: see HoldPoints.at. overtake: computes the step of that batch id."""
        self.step = step
        self.interval_s = points.look_interval_s
        self.is_alone = points.is_alone
        self._points, self._queued, self._overtake = points, queued, overtake
        self._next = 0  # the point that comes next

    def begin(self) -> None:
        """Compute what goes before all of the step. Returns when its hidden states are on their way."""
        self.agree(is_first=True)

    def end(self) -> None:
        """Compute what overtakes the step as long as its leader computes it."""
        self._compute(self._points.at_end(self.step))

    def is_overtaken(self) -> bool:
        """See Points."""
        return self._points.has_found(self._next, self.step, self._queued)

    def overtake(self) -> None:
        """See Points."""
        self._compute(self._points.before(self._next, self.step, self._queued))

    def agree(self, count: int = 1, *, is_first: bool = False) -> None:
        """See Points."""
        self._next += count - 1
        self._compute(self._points.at(self._next, self.step, self._queued, is_first))
        self._next += 1

    def _compute(self, batch_ids: Iterator[int]) -> None:
        for batch_id in batch_ids:
            self._overtake(batch_id)
