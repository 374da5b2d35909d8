"""Plays sessions: which turn comes when, given when those before it have ended. In virtual time and in real time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from megatron_medha.core.request import Request
from megatron_medha.workload.key_chain import KeyChain, TextSpan, after_tokens, cut
from megatron_medha.workload.sessions import AgentSession, SessionTurn


@dataclass(slots=True)
class _LiveSession:
    """Where a session stands."""

    session: AgentSession
    children: dict[int, list[AgentSession]]   # that begin when this turn of it has ended
    num_children: int = 0                     # that have begun there and not ended
    num_sent: int = 0                         # turns
    text: tuple[TextSpan, ...] = ()           # of the last turn's prompt and output
    chain: KeyChain | None = None             # of that text, as far as its tokens are out


@dataclass(slots=True)
class SessionPlay:
    """A RequestFeed of sessions: a closed loop.

    A turn comes its gap after the turn before has ended, with all subagents that began there. A turn that fails ends
    its session; those who wait for the session go on.

    max_live: sessions without a parent at a time, the next begins when one ends. until_s: no turn comes from then on.
    names_sessions: whether requests carry the session's id, and the last one that it is the last.
    """

    sessions: Sequence[AgentSession]
    granule_tokens: int | None = None
    max_live: int | None = None
    until_s: float = inf
    names_sessions: bool = True
    next_s: float = field(init=False, default=inf)
    num_not_sent: int = field(init=False, default=0)   # turns of sessions that ended early
    _due: list[tuple[float, int, _LiveSession]] = field(init=False, default_factory=list)  # a heap
    _waiting: deque[AgentSession] = field(init=False, default_factory=deque)
    _live: dict[str, _LiveSession] = field(init=False, default_factory=dict)               # by name
    _of_request: dict[str, _LiveSession] = field(init=False, default_factory=dict)         # in flight
    _children: dict[str, list[AgentSession]] = field(init=False, default_factory=dict)
    _num_due: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        roots = [one for one in self.sessions if one.parent is None]
        for one in self.sessions:
            if one.parent is not None:
                self._children.setdefault(one.parent, []).append(one)
        num_first = len(roots) if self.max_live is None else self.max_live
        self._waiting.extend(roots[num_first:])
        for one in roots[:num_first]:
            self._begin(one, one.start_s)

    def pop(self) -> Request:
        """See RequestFeed."""
        due_s, _, live = heappop(self._due)
        self._set_next()
        turn = live.session.turns[live.num_sent]
        live.num_sent += 1
        self._of_request[turn.request_id] = live
        keys = b"" if self.granule_tokens is None else self._keys_of_prompt(live, turn)
        goes_on = self.names_sessions and live.num_sent > 1
        return Request(
            request_id=turn.request_id,
            num_prompt_tokens=turn.num_prompt_tokens,
            max_output_tokens=turn.num_output_tokens,
            arrival_s=due_s,
            prefix_keys=keys,
            session_id=live.session.name if self.names_sessions else "",
            ends_session=self.names_sessions and live.num_sent == len(live.session.turns),
            num_session_tokens=turn.num_prompt_tokens - turn.num_new_tokens if goes_on else None,
        )

    def turn(self, request_id: str) -> SessionTurn:
        """The turn of a request that is in flight."""
        live = self._of_request[request_id]
        return live.session.turns[live.num_sent - 1]

    def session_of(self, request_id: str) -> AgentSession:
        """The session of a request that is in flight."""
        return self._of_request[request_id].session

    def ended(self, request_id: str, now_s: float, is_finished: bool) -> None:
        """See RequestFeed."""
        live = self._of_request.pop(request_id)
        turns = live.session.turns
        if not is_finished:
            self._end(live, now_s)
            return
        turn = turns[live.num_sent - 1]
        if live.chain is not None:
            live.chain.extend(after_tokens(turn.output, live.chain.num_tokens - turn.num_prompt_tokens))
        begun = live.children.get(live.num_sent - 1, ())
        live.num_children = len(begun)
        for child in begun:
            self._begin(child, now_s)
        if not begun:
            self._go_on(live, now_s)

    def filled_keys(self, request_id: str, num_tokens: int) -> bytes:
        """See RequestFeed."""
        live = self._of_request.get(request_id)
        if live is None or live.chain is None or not live.chain.keys:
            return b""
        turn = live.session.turns[live.num_sent - 1]
        spans = after_tokens(turn.output, live.chain.num_tokens - turn.num_prompt_tokens)
        return b"".join([live.chain.append(span) for span in cut(spans, num_tokens - live.chain.num_tokens)])

    def _begin(self, session: AgentSession, at_s: float) -> None:
        children: dict[int, list[AgentSession]] = {}
        for child in self._children.get(session.name, ()):
            children.setdefault(child.parent_turn, []).append(child)
        live = self._live[session.name] = _LiveSession(session, children)
        self._go_on(live, at_s)

    def _go_on(self, live: _LiveSession, now_s: float) -> None:
        """Let the next turn of a session come, or the session end."""
        turns = live.session.turns
        if live.num_sent == len(turns):
            self._end(live, now_s)
            return
        due_s = now_s + turns[live.num_sent].gap_s
        if due_s >= self.until_s:
            self._end(live, now_s)
            return
        heappush(self._due, (due_s, self._num_due, live))
        self._num_due += 1
        self._set_next()

    def _end(self, live: _LiveSession, now_s: float) -> None:
        session = live.session
        del self._live[session.name]
        live.chain = None
        self.num_not_sent += len(session.turns) - live.num_sent
        never_begun = [child for turn, found in live.children.items() if turn >= live.num_sent for child in found]
        self.num_not_sent += sum(self._num_turns(child) for child in never_begun)
        if session.parent is None:
            if self._waiting:
                self._begin(self._waiting.popleft(), now_s)
        elif (parent := self._live.get(session.parent)) is not None:
            parent.num_children -= 1
            if not parent.num_children:
                self._go_on(parent, now_s)

    def _num_turns(self, session: AgentSession) -> int:
        return len(session.turns) + sum(self._num_turns(child) for child in self._children.get(session.name, ()))

    def _keys_of_prompt(self, live: _LiveSession, turn: SessionTurn) -> bytes:
        assert self.granule_tokens is not None
        common = len(live.text)
        if live.chain is None or turn.prompt[:common] != live.text:
            live.chain, common = KeyChain(self.granule_tokens), 0
        live.chain.extend(turn.prompt[common:])
        live.text = turn.prompt + turn.output
        return live.chain.keys

    def _set_next(self) -> None:
        self.next_s = self._due[0][0] if self._due else inf
