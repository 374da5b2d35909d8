"""A few places for work that clients send, given out in fair shares. Event loop only."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import NamedTuple

_HALF_LIFE_S = 30.0  # of the time that a client has used
_NOTHING_S = 0.01    # less than this is forgotten


class _Waiter(NamedTuple):
    client: str
    size: int
    number: int
    turn: asyncio.Future[None]


class FairSemaphore:
    """Next is the client that has the fewest places, or used the least time of late; of its work, what is smallest."""

    def __init__(self, num_places: int, max_per_client: int) -> None:
        """max_per_client: places that one client may have at a time."""
        self._num_free = num_places
        self._max_per_client = max_per_client
        self._running: Counter[str] = Counter()
        self._used: dict[str, tuple[float, float]] = {}  # by client: seconds, and when that was so
        self._waiting: list[_Waiter] = []
        self._numbers = count()

    @asynccontextmanager
    async def place(self, client: str, size: int, timeout_s: float) -> AsyncIterator[None]:
        """A place for the time of the block; TimeoutError if none comes in time."""
        loop = asyncio.get_running_loop()
        await self._take(client, size, timeout_s)
        began_s = loop.time()
        try:
            yield
        finally:
            self._give_back(client, loop.time() - began_s)

    def locked(self) -> bool:
        """Whether all places are taken."""
        return not self._num_free

    def num_waiting(self, client: str) -> int:
        """Of one client."""
        return sum(one.client == client for one in self._waiting)

    async def _take(self, client: str, size: int, timeout_s: float) -> None:
        waiting = _Waiter(client, size, next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        try:
            async with asyncio.timeout(timeout_s):
                await waiting.turn
        except (TimeoutError, asyncio.CancelledError):
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:  # its turn came at the same moment
                self._give_back(client, 0.0)
            raise

    def _give_back(self, client: str, used_s: float) -> None:
        self._num_free += 1
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        self._used[client] = (self._used_s(client) + used_s, asyncio.get_running_loop().time())
        if self._num_free and not self._waiting:
            self._used = {one: used for one, used in self._used.items() if self._used_s(one) > _NOTHING_S}
        self._admit()

    def _admit(self) -> None:
        used_s = {one.client: self._used_s(one.client) for one in self._waiting}  # once, as it falls with the time

        def order(waiting: _Waiter) -> tuple[int, float, int, int]:
            return self._running[waiting.client], used_s[waiting.client], waiting.size, waiting.number

        while self._num_free:
            may_go = [
                one for one in self._waiting
                if self._running[one.client] < self._max_per_client and not one.turn.done()  # done: cancelled
            ]  # fmt: skip
            if not may_go:
                return
            chosen = min(may_go, key=order)
            self._waiting.remove(chosen)
            self._num_free -= 1
            self._running[chosen.client] += 1
            chosen.turn.set_result(None)

    def _used_s(self, client: str) -> float:
        used_s, at_s = self._used.get(client, (0.0, 0.0))
        return used_s * 0.5 ** ((asyncio.get_running_loop().time() - at_s) / _HALF_LIFE_S) if used_s else 0.0
