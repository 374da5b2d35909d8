"""A closed loop of agent sessions over one server and one prefix index: no scheduler, no ranks, simulated time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from megatron_medha.core.kv.block_pool import BlockPool
from megatron_medha.core.kv.eviction import EvictionOrder, EvictionRules
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.segment import Segment

GRANULE = 64  # tokens
SYSTEM_GRANULES = 64  # one system prompt for all, 4K tokens
NUM_LIVE, NUM_KEPT = 64, 16  # sessions at a time, and how many the memory holds


@dataclass(frozen=True, slots=True)
class Turn:
    """New prompt tokens and output tokens, in granules, and the seconds until the next turn."""

    num_new: int
    num_output: int
    think_s: float


@dataclass(slots=True)
class Session:
    """A script of turns, and where it stands."""

    name: str
    turns: list[Turn]
    keys: bytes
    num_done: int = 0
    next_arrival_s: float = 0.0


def think_s(pick: random.Random) -> float:
    """86.5% below 1 s, 95.1% below 10 s, the rest to 600 s; log-uniform within each."""
    part = pick.random()
    low, high = (0.05, 1.0) if part < 0.865 else (1.0, 10.0) if part < 0.951 else (10.0, 600.0)
    return float(low * (high / low) ** pick.random())


def make_session(pick: random.Random, name: str, system: bytes) -> Session:
    """Turns, of which the median session has 43: 3K new prompt tokens and 444 output tokens on average."""
    num_turns = max(2, min(150, round(pick.lognormvariate(3.76, 0.5))))
    turns = []
    for number in range(num_turns):
        new = pick.lognormvariate(3.6, 0.7) * (4 if number == 0 else 1)
        turns.append(Turn(max(1, round(new)), max(1, round(pick.expovariate(1 / 7))), think_s(pick)))
    return Session(name, turns, system + pick.randbytes(16 * sum(turn.num_new + turn.num_output for turn in turns)))


def mean_granules(sessions: list[Session]) -> float:
    """A session's context, over sessions and their turns."""
    total = count = 0
    for session in sessions:
        length = SYSTEM_GRANULES
        for turn in session.turns:
            length += turn.num_new + turn.num_output
            total, count = total + length, count + 1
    return total / count


@dataclass(slots=True)
class Outcome:
    """Of one run."""

    num_prompt: int = 0   # granules of prompts
    num_hits: int = 0
    busy_s: float = 0.0
    end_s: float = 0.0
    service_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Hit tokens over prompt tokens."""
        return self.num_hits / self.num_prompt


def recompute_s(first: int, end: int) -> float:
    """Prefill of granules [first, end): 20K tokens a second at first, half of that at 128K tokens of context."""
    seconds = (end - first) * GRANULE / 20e3
    return seconds * (1.0 + (first + end) / 2 * GRANULE / 128e3)


class ClosedLoop:
    """NUM_LIVE sessions before one server; one that ends is replaced until all scripts are done.

    make_order: the eviction order of the one rank; it may look at the loop, as the clairvoyant does. patience: the
    queue is in the order of arrival + patience x uncached work; 0: first come, first served.
    """

    def __init__(
        self,
        seed: int,
        make_order: Callable[[EvictionRules, ClosedLoop], EvictionOrder],
        speed: float = 1.0,
        num_sessions: int = 128,
        patience: float = 0.0,
        is_infinite: bool = False,
    ) -> None:
        pick = random.Random(seed)
        system = pick.randbytes(16 * SYSTEM_GRANULES)
        scripts = [make_session(pick, f"s{number}", system) for number in range(num_sessions)]
        num_blocks = max(round(NUM_KEPT * mean_granules(scripts)), max(len(s.keys) // 16 for s in scripts) + 1)
        if is_infinite:
            num_blocks = sum(len(script.keys) // 16 for script in scripts)
        self.patience = patience
        self.num_blocks, self.speed, self.now_s, self.outcome = num_blocks, speed, 0.0, Outcome()
        self.pool = BlockPool(num_blocks)
        rules = EvictionRules(num_blocks=num_blocks, recompute_s=recompute_s)
        self.index = PrefixIndex([[self.pool]], 1, 1 << 30, lambda rules: make_order(rules, self), rules)
        self.sessions = {script.name: script for script in scripts}
        self.waiting: dict[str, float] = {}  # session -> when it is due
        self._watched: dict[str, Segment | None] = {}
        self._arrivals: list[tuple[float, str]] = []
        self._later = deque(scripts[NUM_LIVE:])
        for script in scripts[:NUM_LIVE]:
            self._begin(script, pick.uniform(0.0, 30.0))

    def run(self) -> Outcome:
        """Every turn of every session."""
        while self._arrivals or self.waiting:
            while self._arrivals and (self._arrivals[0][0] <= self.now_s or not self.waiting):
                arrival_s, name = heappop(self._arrivals)
                self.now_s = max(self.now_s, arrival_s)
                self._watch(name)
            name = min(self.waiting, key=lambda name: (self.waiting[name], name))
            del self.waiting[name]
            self._serve(self.sessions[name])
        self.outcome.end_s = self.now_s
        return self.outcome

    def _begin(self, session: Session, arrival_s: float) -> None:
        session.next_arrival_s = arrival_s
        heappush(self._arrivals, (arrival_s, session.name))

    def _lengths(self, session: Session) -> tuple[int, int]:
        """Granules of the prompt of its next turn, and with the output."""
        done = SYSTEM_GRANULES + sum(turn.num_new + turn.num_output for turn in session.turns[: session.num_done])
        turn = session.turns[session.num_done]
        return done + turn.num_new, done + turn.num_new + turn.num_output

    def _watch(self, name: str) -> None:
        session = self.sessions[name]
        num_prompt = self._lengths(session)[0]
        match = self.index.match(session.keys, 0, num_prompt - 1, 0)
        due_s = session.next_arrival_s + self.patience * recompute_s(match.end, num_prompt) / self.speed
        self.waiting[name] = due_s
        self._watched[name] = self.index.watch(name, match, self.now_s, due_s)

    def _serve(self, session: Session) -> None:
        """One turn, alone, from its hits to its release."""
        index, outcome = self.index, self.outcome
        num_prompt, num_all = self._lengths(session)
        index.unwatch(session.name, self._watched.pop(session.name))
        match = index.match(session.keys, 0, num_prompt - 1, 0)
        holding = index.take(session.name, match, self.now_s, session.name)
        table = index.extents(holding.deepest)
        num_needed = num_all - match.end
        if (missing := num_needed - self.pool.num_free_blocks) > 0:
            for evicted in index.evict(0, missing, self.now_s):
                for waiter in evicted.waiters:
                    self._watch(waiter)
        extents = self.pool.allocate(num_needed)
        assert extents is not None
        table += extents
        turn = session.turns[session.num_done]
        service_s = (recompute_s(match.end, num_prompt) + turn.num_output * GRANULE * 5e-4) / self.speed
        outcome.num_prompt += num_prompt
        outcome.num_hits += match.num_granules
        outcome.busy_s += service_s
        outcome.service_s.append(service_s)
        self.now_s += service_s
        outcome.latency_s.append(self.now_s - session.next_arrival_s)
        index.publish(holding, session.keys, num_all, table, self.now_s)
        session.num_done += 1
        is_last = session.num_done == len(session.turns)
        session.next_arrival_s = float("inf") if is_last else self.now_s + turn.think_s
        index.release(holding, table, self.now_s, ends_session=is_last)
        index.settle(session.name)
        if not is_last:
            self._begin(session, session.next_arrival_s)
        elif self._later:
            self._begin(self._later.popleft(), self.now_s)
