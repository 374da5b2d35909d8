"""Every interleaving of a few requests through the real Scheduler, breadth first, up to order in time and block ids.

Four requests, two of which begin alike, on two KVP ranks with six blocks in all. What may happen next, in every state:
a request arrives, the scheduler forms a batch, the oldest batch leaves the first stage or completes (or one that
overtakes it), a request is aborted or fails, the ranks are lost, all deadlines pass. Decodes grow, so memory runs out,
and the scheduler preempts and evicts. Costs are constant; of time only the order is kept, and whether deadlines have
passed.

Bound on every wait: if nothing new happens, a batch is formed for each token of live requests at most until all of
them have ended. So nothing that one request does makes the work of others be done again without end.
"""

from __future__ import annotations

import gc
import pickle
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

from canonical_state import canonical
from explored_state import BLOCK, LATE_S, Bounds, Script, State
from state_snapshots import Snapshots, scripted_request

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    Event,
    FirstStageDone,
    Output,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.sequence import Status

Action = tuple[str, ...]
_EVENTS_PER_BATCH = 3  # it is formed, leaves the first stage, completes
_COUNTS = (
    "num_transitions", "num_evictions", "num_preemptions", "num_hits", "num_overtakings", "num_sibling_waits"
)  # fmt: skip

FOUR = {
    "A": Script("pqa", 5, 2),
    "B": Script("pqb", 5, 2),
    "C": Script("cd", 2, 3),
    "D": Script("ef", 3, 1),
}


class Broken(AssertionError):
    """A state in which an invariant does not hold; says how it came about."""


class Explorer:
    """Breadth first over states, each kept as bytes until its successors are known.

    Where only one thing can happen next, that is looked at first, and the state is never kept.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.state = State(bounds.scheduler(), sorted(bounds.scripts), [])
        self._snapshots = Snapshots(bounds, self.state)
        self.index_of: dict[int, int] = {}  # canonical hash -> number of the state
        self.parents = array("l")           # by number: the state it was reached from
        self.actions: list[Action] = []     # and by what
        self.drains = array("l")            # by number: the state after it if nothing new happens; -1: there is none
        self.num_tokens = array("l")        # by number: of all requests that live
        self.num_transitions = 0
        self.num_evictions = self.num_preemptions = self.num_hits = self.num_overtakings = 0
        self.num_sibling_waits = 0  # states in which a request waits for what another computes
        self._queue: deque[tuple[int, bytes]] = deque()

    def run(
        self, max_states: int, report: Callable[[str], None] = lambda line: None, seconds: float = inf
    ) -> bool:
        """Explore until there is nothing new (True), or so many states are known, or time is up. Raises Broken."""
        until_s = time.monotonic() + seconds
        if not self.parents:
            self._learn()
            self._find(self.state, -1, ("begin",))
            self._queue.append((0, self._snapshots.save(self.state)))
        gc.collect()
        gc.freeze()
        old_thresholds = gc.get_threshold()
        gc.set_threshold(5_000, 50, 1000)  # states are full of cycles, but short-lived
        num_expanded = 0
        try:
            while self._queue and len(self.index_of) < max_states and time.monotonic() < until_s:
                self._expand(*self._queue.popleft())
                num_expanded += 1
                if num_expanded % 20_000 == 0:
                    report(self.progress())
        finally:
            gc.set_threshold(*old_thresholds)
            gc.unfreeze()
        return not self._queue

    def save(self, path: Path) -> None:
        """All that is known so far, for `resume`."""
        numbers = {action: number for number, action in enumerate(dict.fromkeys(self.actions))}
        known = (
            self._place(), list(numbers), array("l", [numbers[action] for action in self.actions]), self.parents,
            self.drains, self.num_tokens, array("q", self.index_of),
            {name: getattr(self, name) for name in _COUNTS}, len(self._queue),
        )  # fmt: skip
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            pickler = pickle.Pickler(file, 5)
            pickler.dump(known)
            pickler.fast = True  # no memo of millions of snapshots
            for item in self._queue:
                pickler.dump(item)
        unfinished.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from what an explorer of the same bounds has saved, in a process of the same hash seed."""
        self._learn()
        with path.open("rb") as file:
            unpickler = pickle.Unpickler(file)
            (
                place, actions, numbers, self.parents, self.drains, self.num_tokens, hashes, counts, num_queued,
            ) = unpickler.load()  # fmt: skip
            assert place == self._place(), f"{path} is of other code, bounds, or another PYTHONHASHSEED"
            self.actions = [actions[number] for number in numbers]
            self.index_of = {key: number for number, key in enumerate(hashes)}
            for name, count in counts.items():
                setattr(self, name, count)
            self._queue = deque(unpickler.load() for _ in range(num_queued))

    def _place(self) -> tuple[object, ...]:
        """What saved states are readable by."""
        return repr(self.bounds), hash(repr(self.bounds)), self._snapshots.names_of_shared()

    def progress(self) -> str:
        """How far it has come."""
        return (
            f"{len(self.index_of)} distinct states, {self.num_transitions} transitions, {len(self._queue)} states left "
            f"to look at; {self.num_hits} hits, {self.num_evictions} evictions, {self.num_preemptions} preemptions"
        )

    def _learn(self) -> None:
        """Show the snapshots what states consist of."""
        state = self._snapshots.load(self._snapshots.save(self.state))
        names = sorted(self.bounds.scripts)[:2]
        for action in (
            ("arrive", names[0]), ("schedule",), ("leave", "0"), ("schedule",), ("complete", "0"), ("arrive", names[1]),
        ):  # fmt: skip
            self._act(state, action)
            self._snapshots.learn(state)

    def _expand(self, number: int, snapshot: bytes) -> None:
        """All that can happen in a state."""
        state: State | None = self._snapshots.load(snapshot)
        assert state is not None
        for action in list(self._actions(state)):
            if state is None:
                state = self._snapshots.load(snapshot)
            found, is_new = self._step(state, number, action)
            while is_new:
                following = list(self._actions(state))
                if len(following) != 1:
                    self._queue.append((found, self._snapshots.save(state)))
                    break
                found, is_new = self._step(state, found, following[0])
            state = None

    def _step(self, state: State, number: int, action: Action) -> tuple[int, bool]:
        """Let it happen, in place: the number of the state after it, and whether that is new."""
        is_drain, is_idle, num_cached = action == self._drain(state), not state.in_flight, state.num_cached_blocks
        try:
            self._act(state, action)
            self.num_evictions += state.num_cached_blocks < num_cached and action[0] in ("schedule", "complete")
            found, is_new = self._find(state, number, action)
        except Broken:
            raise
        except AssertionError as error:
            raise Broken(f"{error!r} after {self._path(number)} and {action}") from error
        self.num_transitions += 1
        if is_drain and found == number and is_idle and state.scheduler.num_sequences:
            raise Broken(f"nothing runs, and requests wait, after {self._path(number)}")
        if is_drain and found != number:
            self.drains[number] = found
        elif self.drains[number] < 0 and action[0] in ("leave", "complete"):
            self.drains[number] = found  # no batch can be formed, so this is what happens next
        return found, is_new

    def _find(self, state: State, parent: int, action: Action) -> tuple[int, bool]:
        """The number of a state, and whether it is new; then it is checked."""
        key = hash(canonical(state))
        number = self.index_of.get(key)
        if number is not None:
            return number, False
        number = self.index_of[key] = len(self.parents)
        self.parents.append(parent)
        self.actions.append(action)
        self.drains.append(-1)
        self.num_tokens.append(state.num_tokens)
        self._check(state)
        return number, True

    # ---- what can happen ----

    def _actions(self, state: State) -> Iterator[Action]:
        bounds, scheduler = self.bounds, state.scheduler
        if self._may_schedule(state):
            yield ("schedule",)
        oldest = next((batch for batch in state.in_flight if batch.overtakes is None), None)
        for batch in reversed(state.in_flight):  # what overtakes first: that is how it goes as a rule
            place = str(state.in_flight.index(batch))
            if batch.batch_id not in state.left:
                yield ("leave", place)
            elif batch is oldest or batch.overtakes is not None:
                yield ("complete", place)
                if state.num_failures < bounds.num_failures:
                    for chunk in batch.chunks:
                        if chunk.samples_token and not scheduler._sequences[chunk.request_id].is_done:
                            yield ("fail", place, chunk.request_id)
        for name in state.pending:
            yield ("arrive", name)
        if state.num_aborts < bounds.num_aborts:
            for name, seq in scheduler._sequences.items():
                if not seq.is_done:
                    yield ("abort", name)
        if state.num_losses < bounds.num_losses and (state.in_flight or scheduler.memory.owners):
            yield ("lose",)
        if state.num_late < bounds.num_late and scheduler.num_sequences:
            yield ("late",)

    def _may_schedule(self, state: State) -> bool:
        if self.bounds.interruptible:
            return len(state.in_flight) <= self.bounds.spp
        return len(state.in_flight) < self.bounds.spp and len(state.left) == len(state.in_flight)

    def _drain(self, state: State) -> Action | None:
        """What happens next if nobody does anything new, unless no batch can be formed."""
        if self._may_schedule(state):
            return ("schedule",)
        if state.in_flight:
            last = state.in_flight[-1]
            if last.batch_id not in state.left:
                return ("leave", str(len(state.in_flight) - 1))
            return ("complete", "0" if last.overtakes is None else str(len(state.in_flight) - 1))
        return None

    def _act(self, state: State, action: Action) -> None:
        scheduler = state.scheduler
        state.now_s += 1.0
        match action:
            case ("schedule",):
                batch = scheduler.schedule(state.now_s)
                if batch is not None:
                    state.in_flight.append(batch)
                    self.num_overtakings += batch.overtakes is not None
            case ("leave", place):
                batch_id = state.in_flight[int(place)].batch_id
                state.left.append(batch_id)
                self._handle(state, FirstStageDone(batch_id))
            case ("complete", place, *names) | ("fail", place, *names):
                batch = state.in_flight.pop(int(place))
                state.left.remove(batch.batch_id)
                failed = tuple((name, "not a number") for name in names)
                state.num_failures += len(failed)
                self._handle(state, Completed(batch.batch_id, 1.0, (), failed, self._filled(state, batch, failed)))
            case ("arrive", name):
                state.pending.remove(name)
                self._handle(state, Arrived(scripted_request(name, state.now_s)))
            case ("abort", name):
                state.num_aborts += 1
                self._handle(state, Aborted(name))
            case ("lose",):
                state.num_losses += 1
                state.in_flight.clear()
                state.left.clear()
                self._handle(state, RanksLost("a rank died"))
            case ("late",):
                state.num_late += 1
                state.now_s += LATE_S
        scheduler.memory.work_s = [0.0, 0.0]  # it grows without end, and decides only between ranks alike in all else

    def _handle(self, state: State, event: Event) -> None:
        outputs: list[Output] = state.scheduler.handle(event, state.now_s)
        for output in outputs:
            match output:
                case Rejected(is_client_fault=is_fault):
                    assert not is_fault, "a request within the limits is rejected"
                case TokenOut(num_cached_tokens=num_cached):
                    self.num_hits += num_cached > 0
                case _:
                    self.num_preemptions += 1

    def _filled(
        self, state: State, batch: Batch, failed: tuple[tuple[str, str], ...]
    ) -> tuple[tuple[str, bytes], ...]:
        """Keys of granules that become full with the tokens sampled now."""
        filled = []
        for chunk in batch.chunks:
            seq = state.scheduler._sequences.get(chunk.request_id)
            if chunk.samples_token and seq is not None and not seq.is_done and (seq.num_known_tokens + 1) % BLOCK == 0:
                granule = seq.num_known_tokens // BLOCK
                filled.append((chunk.request_id, self.bounds.scripts[chunk.request_id].keys(granule, granule + 1)))
        return tuple(filled)

    # ---- what has to hold ----

    def _check(self, state: State) -> None:
        """Every block is free, owned or cached once, counts are right, and every live sequence is where it belongs."""
        scheduler, memory = state.scheduler, state.scheduler.memory
        owners = memory.owners.values()
        assert memory.cache is not None and scheduler._prefixes is not None
        siblings = scheduler._prefixes.siblings
        self.num_sibling_waits += bool(siblings._awaited)
        owned = [
            (0, shard.kvp_rank, memory.cache.index.own_extents(holding, shard.extents))
            for seq in owners
            for shard, holding in zip(seq.block_table.shards, seq.block_table.holdings, strict=True)
        ]
        check(memory.cache.index, [holding for seq in owners for holding in seq.block_table.holdings], owned)
        chunks = [chunk for batch in state.in_flight for chunk in batch.chunks]
        overtaking = [batch for batch in state.in_flight if batch.overtakes is not None]
        assert len(overtaking) <= 1 and len(state.in_flight) - len(overtaking) <= self.bounds.spp
        for batch in overtaking:
            names = {chunk.request_id for chunk in batch.chunks}
            before = [other for other in state.in_flight if other.batch_id < batch.batch_id]
            passed = {chunk.request_id for other in before for chunk in other.chunks}
            assert not names & passed, "it has nothing that was in flight"
        for name, seq in scheduler._sequences.items():
            num_in_flight = sum(chunk.request_id == name for chunk in chunks)
            assert seq.num_batches_in_flight == num_in_flight, f"{name} is in {num_in_flight} batches"
            assert bool(seq.block_table.shards) == (name in memory.owners)
            assert len(seq.keys) // 16 <= seq.num_known_tokens // BLOCK
            places = (
                (name in scheduler._prefills._bucket_of)
                + sum(other is seq for other in scheduler._decodes)
                + sum(other is seq for other in scheduler._growing)
            )
            if seq.is_done:
                assert not places and num_in_flight, f"{name} has ended and is kept"
            elif seq.status is Status.DECODING or not seq.num_unscheduled_tokens:
                assert places + (num_in_flight > 0) == 1, f"{name} is lost"
            elif (other := siblings.awaited(seq)) is not None:
                assert not places and other.is_prefill and other.block_table.shards, f"{name} waits for nobody"
            else:
                assert places == 1 and name in scheduler._prefills._bucket_of, f"{name} is lost"
            if seq.is_waiting and not seq.is_done:
                assert not seq.block_table.shards and seq.num_scheduled_tokens == seq.num_cached_tokens
            if not seq.is_waiting and not seq.is_done:
                assert seq.capacity_tokens >= seq.num_scheduled_tokens, f"{name} computes without memory"
        if not scheduler.num_sequences:
            assert memory.num_free_blocks == 2 * self.bounds.num_blocks, "blocks are lost"

    def check_waits(self) -> int:
        """The most events to the end of all, if nothing new happens, from any state looked at. Raises Broken.

        No more batches are formed than live requests have tokens.
        """
        lengths = array("l", [-1]) * len(self.drains)
        for start in range(len(lengths)):
            path = []
            number = start
            while number >= 0 and lengths[number] == -1:
                lengths[number] = -2
                path.append(number)
                number = self.drains[number]
            if number >= 0 and lengths[number] == -2:
                raise Broken(f"it never ends after {self._path(number)}")
            length = lengths[number] if number >= 0 else 0
            for number in reversed(path):
                following = self.drains[number]
                length += following >= 0
                lengths[number] = length
                if length > _EVENTS_PER_BATCH * (self.num_tokens[number] + self.bounds.spp):
                    raise Broken(f"{length} events for {self.num_tokens[number]} tokens after {self._path(number)}")
        return max(lengths)

    def _path(self, number: int) -> list[Action]:
        path = []
        while number > 0:
            path.append(self.actions[number])
            number = self.parents[number]
        return path[::-1]
