"""Who is next where clients share a few places."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from megatron_medha.grammar.fair_places import FairSemaphore

LONG_S = 1000.0


class Work:
    """Pieces of work that end when the test says so; `began` has their names in order."""

    def __init__(self, places: FairSemaphore) -> None:
        self.places = places
        self.began: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def send(self, *pieces: tuple[str, str, int]) -> None:
        for name, client, size in pieces:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._do(name, client, size))
            await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await asyncio.sleep(0)

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.wait([self._tasks[name]])

    async def _do(self, name: str, client: str, size: int) -> None:
        async with self.places.place(client, size, LONG_S):
            self.began.append(name)
            await self._ends[name].wait()


def in_places(num_places: int, max_per_client: int, test: Callable[[Work], Awaitable[None]]) -> list[str]:
    async def run() -> list[str]:
        work = Work(FairSemaphore(num_places, max_per_client))
        await test(work)
        return work.began

    return asyncio.run(run())


def pieces(client: str, sizes: Sequence[int]) -> list[tuple[str, str, int]]:
    return [(f"{client}{size}", client, size) for size in sizes]


def test_no_client_has_all_places() -> None:
    async def test(work: Work) -> None:
        await work.send(*pieces("a", [1, 2, 3, 4]))
        assert work.began == ["a1", "a2"] and not work.places.locked() and work.places.num_waiting("a") == 2
        await work.send(*pieces("b", [9]))
        assert work.began == ["a1", "a2", "b9"] and work.places.locked()

    in_places(3, 2, test)


def test_of_one_client_the_smallest_is_next() -> None:
    async def test(work: Work) -> None:
        await work.send(*pieces("a", [5, 9, 3, 7]))
        for name in ("a5", "a3", "a7"):
            await work.end(name)

    assert in_places(1, 1, test) == ["a5", "a3", "a7", "a9"]


def test_a_client_that_has_no_place_goes_before_one_that_has() -> None:
    async def test(work: Work) -> None:
        await work.send(*pieces("a", [1, 2, 3, 4]), *pieces("b", [8, 9]))
        for name in ("a1", "a2", "b8", "a3"):
            await work.end(name)

    assert in_places(2, 2, test) == ["a1", "a2", "b8", "a3", "b9", "a4"]


def test_a_client_that_goes_while_it_waits_takes_no_place() -> None:
    async def test(work: Work) -> None:
        await work.send(*pieces("a", [1, 2, 3]))
        await work.cancel("a2")
        await work.end("a1")
        await work.end("a3")
        assert not work.places.locked() and not work.places.num_waiting("a")

    assert in_places(1, 1, test) == ["a1", "a3"]


def test_who_gets_no_place_in_time_is_turned_away() -> None:
    async def run() -> None:
        places = FairSemaphore(1, 1)
        async with places.place("a", 1, LONG_S):
            with pytest.raises(TimeoutError):
                async with places.place("b", 1, 0.0):
                    raise AssertionError("there is no place")
        async with places.place("b", 1, LONG_S):
            assert places.locked()

    asyncio.run(run())
