"""Every interleaving of a few requests through the real Scheduler, breadth first, up to order in time and block ids.

Four requests, two of which begin alike, on two KVP ranks with six blocks in all. What may happen next, in every state:
a request arrives, the scheduler forms a batch, the oldest batch leaves the first stage or completes, a request is
aborted or fails, the ranks are lost, all deadlines pass. Decodes grow, so memory runs out, and the scheduler preempts
and evicts. Costs are constant; of time only the order is kept, and whether deadlines have passed.
"""

from __future__ import annotations

import copyreg
import gc
import io
import pickle
import pickletools
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

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
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.segment import Segment
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.kinetic_tournament import KineticTournament
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

BLOCK = 2  # tokens of a block, and of a granule
LATE_S = 1e6  # by so much the clock goes ahead when all deadlines pass

Action = tuple[str, ...]


class ConstantCost:
    """Every token takes as long as any other, a step itself next to nothing: waiting for a sibling is worth it."""

    revision = 0

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        return 0.1 + 1.0 * num_tokens

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        return 0.0

    def decode_attention_s(self, context: int) -> float:
        """See CostModel."""
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """See CostModel."""


@dataclass(frozen=True, slots=True)
class Script:
    """A request: its prompt and its output as one letter a granule, and its lengths in tokens."""

    text: str
    num_prompt: int
    num_output: int

    def keys(self, first: int, last: int) -> bytes:
        """Of its granules [first, last): a key is all the text up to its end."""
        return b"".join(self.text[: granule + 1].encode().ljust(16, b".") for granule in range(first, last))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is explored."""

    scripts: dict[str, Script]
    num_aborts: int = 1
    num_failures: int = 1
    num_losses: int = 1
    num_late: int = 1     # times that the clock passes all deadlines
    num_blocks: int = 3   # of each of two ranks
    shard_tokens: int = 4
    spp: int = 2


FOUR = {
    "A": Script("pqa", 5, 2),
    "B": Script("pqb", 5, 2),
    "C": Script("cd", 2, 3),
    "D": Script("ef", 3, 1),
}


@dataclass(slots=True)
class State:
    """The scheduler, and what is left to happen."""

    scheduler: Scheduler
    pending: list[str]              # requests that have not arrived
    in_flight: list[Batch]          # oldest first
    left: list[int] = field(default_factory=list)   # of these, the ids of batches that have left the first stage
    num_aborts: int = 0
    num_failures: int = 0
    num_losses: int = 0
    num_late: int = 0
    now_s: float = 0.0


class Broken(AssertionError):
    """A state in which an invariant does not hold; says how it came about."""


class Explorer:
    """Breadth first over states, each kept as bytes until its successors are known."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        config = SchedulerConfig(
            chunking=Chunking.FIXED, fixed_chunk_tokens=4, tile_tokens=1, max_batch_tokens=8, max_num_sequences=4,
            min_deadline_s=1e5, watermark=0.0,
        )  # fmt: skip
        memory = KVMemory(
            num_blocks=bounds.num_blocks, block_size=BLOCK, max_context_len=100, kvp=2,
            max_tokens_per_shard=bounds.shard_tokens, watermark=0.0,
            kv=KVConfig(granule_tokens=BLOCK, eviction="lru"),
        )  # fmt: skip
        scheduler = Scheduler(config, ConstantCost(), memory, bounds.spp)
        self.state = State(scheduler, sorted(bounds.scripts), [])
        self._snapshots = Snapshots(self)
        self.index_of: dict[int, int] = {}  # canonical hash -> number of the state
        self.parents = array("l")           # by number: the state it was reached from
        self.actions: list[Action] = []     # and by what
        self.drains = array("l")            # by number: the state after it if nothing new happens; -1: not looked at
        self.num_transitions = 0
        self.num_evictions = self.num_preemptions = self.num_hits = 0
        self.num_sibling_waits = 0  # states in which a request waits for what another computes

    def run(self, max_states: int, report: Callable[[str], None] = lambda line: None) -> bool:
        """Explore until there is nothing new (True), or that many states are known. Raises Broken."""
        queue: deque[tuple[int, bytes]] = deque()
        self._learn()
        self._visit(self.state, -1, ("begin",), queue)
        gc.collect()
        gc.freeze()
        old_thresholds = gc.get_threshold()
        gc.set_threshold(200_000, 20, 100)  # states are full of cycles, but short-lived
        try:
            num_expanded = 0
            while queue and len(self.index_of) < max_states:
                number, snapshot = queue.popleft()
                self._expand(number, snapshot, queue)
                num_expanded += 1
                if num_expanded % 20_000 == 0:
                    report(f"{len(self.index_of)} states, {self.num_transitions} transitions, {len(queue)} to look at")
        finally:
            gc.set_threshold(*old_thresholds)
            gc.unfreeze()
        return not queue

    def _learn(self) -> None:
        """Show the snapshots what states consist of."""
        state = self._snapshots.load(self._snapshots.save(self.state))
        for action in (("arrive", "A"), ("schedule",), ("leave",), ("schedule",), ("complete",), ("arrive", "B")):
            self._act(state, action)
            self._snapshots.learn(state)

    def _expand(self, number: int, snapshot: bytes, queue: deque[tuple[int, bytes]]) -> None:
        state = self._snapshots.load(snapshot)
        actions = list(self._actions(state))
        is_idle = not state.in_flight
        drain = self._drain(state)
        for action in actions:
            if state is None:
                state = self._snapshots.load(snapshot)
            num_cached = num_cached_blocks(state)
            try:
                self._act(state, action)
                self.num_evictions += num_cached_blocks(state) < num_cached and action[0] in ("schedule", "complete")
                found = self._visit(state, number, action, queue)
            except AssertionError as error:
                if isinstance(error, Broken):
                    raise
                raise Broken(f"{error!r} after {self._path(number)} and {action}") from error
            self.num_transitions += 1
            if action == drain:
                if action == ("schedule",) and is_idle and found == number and state.scheduler.num_sequences:
                    raise Broken(f"nothing runs, and requests wait, after {self._path(number)}")
                if action == ("schedule",) and found == number:
                    drain = self._drain(state, is_blocked=True)
                    continue
                self.drains[number] = found
            state = None

    def _visit(self, state: State, parent: int, action: Action, queue: deque[tuple[int, bytes]]) -> int:
        """The number of a state; a new one is checked and kept for later."""
        key = hash(canonical(state))
        number = self.index_of.get(key)
        if number is None:
            number = self.index_of[key] = len(self.parents)
            self.parents.append(parent)
            self.actions.append(action)
            self.drains.append(-1)
            self._check(state)
            queue.append((number, self._snapshots.save(state)))
        return number

    # ---- what can happen ----

    def _actions(self, state: State) -> Iterator[Action]:
        bounds, scheduler = self.bounds, state.scheduler
        if len(state.in_flight) < bounds.spp and len(state.left) == len(state.in_flight):
            yield ("schedule",)
        if state.in_flight:
            oldest = state.in_flight[0]
            newest = state.in_flight[-1]
            if newest.batch_id not in state.left:
                yield ("leave",)
            if oldest.batch_id in state.left:
                yield ("complete",)
                if state.num_failures < bounds.num_failures:
                    for chunk in oldest.chunks:
                        if chunk.samples_token and not scheduler._sequences[chunk.request_id].is_done:
                            yield ("fail", chunk.request_id)
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

    def _drain(self, state: State, is_blocked: bool = False) -> Action | None:
        """What happens next if nobody does anything new."""
        if not is_blocked and len(state.in_flight) < self.bounds.spp and len(state.left) == len(state.in_flight):
            return ("schedule",)
        if state.in_flight:
            return ("leave",) if state.in_flight[-1].batch_id not in state.left else ("complete",)
        return None

    def _act(self, state: State, action: Action) -> None:
        scheduler = state.scheduler
        state.now_s += 1.0
        match action:
            case ("schedule",):
                batch = scheduler.schedule(state.now_s)
                if batch is not None:
                    state.in_flight.append(batch)
            case ("leave",):
                batch_id = state.in_flight[-1].batch_id
                state.left.append(batch_id)
                self._handle(state, FirstStageDone(batch_id))
            case ("complete",) | ("fail", _):
                batch = state.in_flight.pop(0)
                state.left.remove(batch.batch_id)
                failed = tuple((name, "not a number") for name in action[1:])
                state.num_failures += len(failed)
                self._handle(state, Completed(batch.batch_id, 1.0, (), failed, self._filled(state, batch, failed)))
            case ("arrive", name):
                state.pending.remove(name)
                self._handle(state, Arrived(_request(name, state.now_s)))
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

    def longest_drain(self) -> int:
        """The most steps to the end of all, if nothing new happens, from any state looked at. Raises Broken if none."""
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
        return max(lengths)

    def _path(self, number: int) -> list[Action]:
        path = []
        while number > 0:
            path.append(self.actions[number])
            number = self.parents[number]
        return path[::-1]


def num_cached_blocks(state: State) -> int:
    """On both ranks."""
    return sum([pool.num_cached_blocks for pool in state.scheduler.memory.pools])


def make_request(script: Script, name: str, arrival_s: float) -> Request:
    """The request of a script."""
    return Request(
        request_id=name, num_prompt_tokens=script.num_prompt, max_output_tokens=script.num_output, arrival_s=arrival_s,
        prefix_keys=script.keys(0, script.num_prompt // BLOCK),
    )


# ---- snapshots: what never changes is shared, the rest is pickled ----

_SCRIPTS: dict[str, Script] = {}


@cache
def _request(name: str, arrival_s: float) -> Request:
    return make_request(_SCRIPTS[name], name, arrival_s)


class Snapshots:
    """A state as bytes and back.

    The memo of every pickler begins with what all states share: constants, classes, names of attributes. So they
    are in the bytes as numbers, and come back as the same objects.
    """

    def __init__(self, explorer: Explorer) -> None:
        scheduler = explorer.state.scheduler
        _SCRIPTS.clear()
        _SCRIPTS.update(explorer.bounds.scripts)
        _request.cache_clear()
        nothing = KineticTournament()  # so few requests never reach it
        for bucket in scheduler._prefills._buckets.values():
            bucket.queue._rest = nothing
        self._shared: list[Any] = [
            scheduler.config, scheduler.cost, scheduler.policy, scheduler.policy.priority, scheduler._deadlines,
            scheduler.memory.kv, scheduler._builder._rule, scheduler._builder._strategy, nothing,
        ]  # fmt: skip
        self._table = {**copyreg.dispatch_table, Request: _reduce_request}
        self._set_memo()

    def learn(self, state: State) -> None:
        """Share the classes and the names that a state has too."""
        found: dict[Any, None] = {}
        for opcode, argument, _ in pickletools.genops(self.save(state)):
            if opcode.name == "BINUNICODE":
                found[sys.intern(argument)] = None
            elif opcode.name == "GLOBAL":
                module, name = argument.split()
                found[getattr(sys.modules[module], name)] = None
        self._shared += [item for item in found if not any(item is other for other in self._shared)]
        self._set_memo()

    def save(self, state: State) -> bytes:
        """As bytes."""
        builder = state.scheduler._builder
        builder.prefills, builder.loads = [], []  # of the last batch
        file = io.BytesIO()
        pickler = pickle.Pickler(file, _PROTOCOL)
        pickler.dispatch_table = self._table
        pickler.memo = self._pickler.memo
        pickler.dump(state)
        return file.getvalue()

    def load(self, snapshot: bytes) -> State:
        """And back."""
        unpickler = pickle.Unpickler(io.BufferedReader(io.BytesIO(snapshot)))  # type: ignore[arg-type]
        unpickler.memo = self._unpickler.memo
        state = unpickler.load()
        assert isinstance(state, State)
        return state

    def _set_memo(self) -> None:
        file = io.BytesIO()
        self._pickler = pickle.Pickler(file, _PROTOCOL)
        self._pickler.memo = {id(item): (number, item) for number, item in enumerate(self._shared)}
        # An unpickler's memo can be set only from another's: one that has got the items by their numbers.
        getter = f"c{__name__}\n{_item.__name__}\n".encode()
        calls = b"".join(
            getter + b"J" + number.to_bytes(4, "little") + b"\x85Rr" + number.to_bytes(4, "little") + b"0"
            for number in range(len(self._shared))
        )
        _ITEMS[:] = self._shared
        self._unpickler = pickle.Unpickler(io.BytesIO(b"\x80\x03" + calls + b"N."))
        self._unpickler.load()


_PROTOCOL = 3  # later ones number what they remember by themselves, from 0
_ITEMS: list[Any] = []


def _item(number: int) -> Any:
    return _ITEMS[number]


def _reduce_request(request: Request) -> tuple[Any, ...]:
    return _request, (request.request_id, request.arrival_s)


# ---- what makes two states the same ----


def canonical(state: State) -> tuple[Any, ...]:
    """A state without clocks, batch ids and block ids: blocks by the order in which they are met, times by rank."""
    scheduler = state.scheduler
    memory = scheduler.memory
    names: list[dict[int, int]] = [{}, {}]
    live = [_sequence(seq, names) for _, seq in sorted(scheduler._sequences.items())]
    segments = [_segment(segment, names) for segment in _segments(state)]
    prefixes = scheduler._prefixes
    assert prefixes is not None
    waits, siblings = prefixes._waits, prefixes.siblings
    reservation = memory.reservation
    kept = None
    if reservation is not None:
        kept = (reservation.request_id, tuple(memory._num_reserved(rank, _NOBODY) for rank in (0, 1)))
    overdue = scheduler._packer._overdue
    return (
        tuple(state.pending), state.num_aborts, state.num_failures, state.num_losses, state.num_late,
        tuple(scheduler._sequences), tuple(live), tuple(segments),
        tuple([(batch.chunks, batch.batch_id in state.left) for batch in state.in_flight]),
        tuple([seq.request_id for seq in scheduler._decodes]), tuple([seq.request_id for seq in scheduler._growing]),
        tuple(sorted(scheduler._prefills._bucket_of)), tuple(scheduler._released),
        tuple([(op.kind, op.request_id) for op in scheduler._kv_ops]),
        kept, overdue.request_id if overdue is not None else None, round(scheduler._packer._overdue_credit_s, 6),
        tuple(memory.owners), tuple(memory._pending_work),
        tuple(sorted((name, wait.next_key) for name, wait in waits._waits.items())),
        tuple(sorted((name, prefill.next_key, *prefill.waiters) for name, prefill in siblings._prefills.items())),
        tuple(sorted((name, lead.request_id) for name, lead in siblings.leads.items())),
        tuple(prefixes._moved), tuple(prefixes._freed),
    )  # fmt: skip


_NOBODY = Sequence(request=Request(request_id="", num_prompt_tokens=1, max_output_tokens=1, arrival_s=0.0))


def _blocks(extents: list[Extent], names: dict[int, int]) -> tuple[int, ...]:
    return tuple([
        names.setdefault(block, len(names)) for first, count in extents for block in range(first, first + count)
    ])


def _sequence(seq: Sequence, names: list[dict[int, int]]) -> tuple[Any, ...]:
    table = seq.block_table
    return (
        seq.request_id, seq.status.value, seq.num_scheduled_tokens, seq.num_first_stage_tokens,
        seq.num_computed_tokens, seq.num_output_tokens, seq.num_batches_in_flight, seq.keys, seq.num_cached_tokens,
        seq.num_promised_tokens, seq.total_work_s, seq.remaining_work_s, seq.capacity_tokens, seq.grow_tokens,
        seq.publish_tokens, seq.change_tokens, len(table.unsent), seq.triage_deadline_s < 1e300,
        tuple([(shard.kvp_rank, _blocks(shard.extents, names[shard.kvp_rank])) for shard in table.shards]),
        tuple([(h.end, h.deepest.first if h.deepest else -1, tuple(h.duplicates)) for h in table.holdings]),
    )  # fmt: skip


def _segments(state: State) -> list[Segment]:
    """All that are listed or held, in an order of their own."""
    cache = state.scheduler.memory.cache
    assert cache is not None
    found = {segment: None for tree in cache.index.trees[0] for segment in tree.heads.values()}
    for seq in state.scheduler.memory.owners.values():
        for holding in seq.block_table.holdings:
            segment = holding.deepest
            while segment is not None:
                found[segment] = None
                segment = segment.parent
    ranks = {time: rank for rank, time in enumerate(sorted({s.last_use_s for s in found if not s.pins}))}
    _RANKS.clear()
    _RANKS.update({id(s): -1 if s.pins else ranks[s.last_use_s] for s in found})
    return sorted(found, key=lambda s: (s.kvp_rank, s.is_listed, s.first, bytes(s.keys), s.creator, s.pins))


_RANKS: dict[int, int] = {}


def _segment(segment: Segment, names: list[dict[int, int]]) -> tuple[Any, ...]:
    return (
        segment.kvp_rank, segment.first, bytes(segment.keys), segment.creator, segment.pins, segment.num_references,
        segment.is_listed, getattr(segment, "is_proven", None), _RANKS[id(segment)],
        tuple(segment.waiters), _blocks(segment.extents, names[segment.kvp_rank]),
    )  # fmt: skip
