"""At which points of a step that may be held another one is computed first: the same on all ranks that share them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator

from megatron_medha.cluster.messages import RankStep
from megatron_medha.core.layout import Coord, ParallelLayout
from megatron_medha.parallel.point_board import Decision, PointBoard, end_of, place_of
from megatron_medha.parallel.shm_channel import pause


def may_pass(overtaking: RankStep, held: RankStep) -> bool:
    """Whether a step may be computed at a point of another one; see Batch."""
    oldest = overtaking.overtakes
    return held.may_be_held and oldest is not None and oldest <= held.batch_id < overtaking.batch_id


class HoldPoints:
    """One rank's part in the decisions of its pipeline stage."""

    def __init__(self, rank: int, layout: ParallelLayout, board: PointBoard | None) -> None:
        """board: None where not all ranks share memory; a rank alone needs none."""
        coord = layout.coord_of(rank)
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

    def at(
        self, point: int, held: RankStep, queued: Callable[[], Iterable[RankStep]], is_first: bool
    ) -> Iterator[int]:
        """Batch ids of steps to be computed at this point of a step, each before the next is asked for.

        queued: steps that this rank knows of and has not computed; looks for new ones first. is_first: the step has
        not begun, and does not before its hidden states have been sent.
        """
        place = place_of(held.batch_id, point)
        return self._led(place, held, queued, is_first) if self.leads(held) else self._followed(place, held)

    def beside(self, held: RankStep) -> Iterator[int]:
        """The same for a rank without a part in the step, until its leader has ended it.

        It must not go on to a later step: what overtakes may be shared with a rank that holds this one, and so may the
        later step, in the other order.
        """
        return iter(()) if self.leads(held) else self._followed(end_of(held.batch_id), held)

    def ended(self, held: RankStep) -> None:
        """Nothing overtakes this step any more."""
        if self._board is not None and self.leads(held):
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
        if self._board is not None:
            self._board.reached(place)

    def _followed(self, place: int, held: RankStep) -> Iterator[int]:
        assert self._board is not None
        board, leader, index = self._board, self._leader(held), held.leader
        started_s = time.monotonic()
        while True:
            is_past = board.place_reached(leader) >= place  # read first: what was decided before is then there
            while self._num_taken[index] < board.num_decisions(leader):
                decision = board.decision(leader, self._num_taken[index])
                if decision.place > place:
                    break
                self._num_taken[index] += 1
                yield decision.batch_id
                started_s = time.monotonic()
            if is_past:
                return
            pause(time.monotonic() - started_s)

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
    """The points of one step. Their numbers are the same on all its ranks, also where some have no rows in a piece."""

    def __init__(
        self,
        points: HoldPoints,
        step: RankStep,
        queued: Callable[[], Iterable[RankStep]],
        overtake: Callable[[int], None],
    ) -> None:
        """queued: see HoldPoints.at. overtake: computes the step of that batch id."""
        self.step = step
        self._points, self._queued, self._overtake = points, queued, overtake

    def beside(self) -> None:
        """Compute what overtakes the step, of which this rank has no part."""
        for batch_id in self._points.beside(self.step):
            self._overtake(batch_id)

    def begin(self) -> None:
        """Compute what goes before all of the step. Returns when its hidden states are on their way."""
        self._pass(0, is_first=True)

    def before_piece(self, piece: int, num_pieces: int) -> Callable[[], None]:
        """To be called before that piece of the step, once in each layer."""
        numbers = itertools.count(1 + piece, num_pieces)
        return lambda: self._pass(next(numbers))

    def _pass(self, point: int, *, is_first: bool = False) -> None:
        for batch_id in self._points.at(point, self.step, self._queued, is_first):
            self._overtake(batch_id)
