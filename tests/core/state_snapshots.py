"""States of an exploration as bytes and back: what never changes is shared, the rest is pickled."""

from __future__ import annotations

import copyreg
import io
import pickle
import pickletools
import sys
from functools import cache
from typing import Any

from explored_state import EVEN_RATES, Bounds, Script, State

from megatron_medha.core.request import Request

_SCRIPTS: dict[str, Script] = {}


@cache
def scripted_request(name: str, arrival_s: float) -> Request:
    """The request of a script, one object however often it is loaded."""
    return _SCRIPTS[name].request(name, arrival_s)


class Snapshots:
    """States as bytes and back.

    The memo of every pickler begins with what all states share: constants, counts that decide nothing, classes, names
    of attributes. So they are in the bytes as numbers, and come back as the same objects.
    """

    def __init__(self, bounds: Bounds, state: State) -> None:
        """state: of a scheduler without requests, like which all states are."""
        scheduler = state.scheduler
        _SCRIPTS.clear()
        _SCRIPTS.update(bounds.scripts)
        scripted_request.cache_clear()
        cache_ = scheduler.memory.cache
        assert cache_ is not None
        index = cache_.index
        self._shared: list[Any] = [
            scheduler.config, scheduler.cost, scheduler.policy, scheduler.policy.priority, scheduler._deadlines,
            scheduler.memory.kv, scheduler._builder._rule, scheduler._builder._strategy, EVEN_RATES,
            scheduler._utilization, index.reuse_gaps, index.eviction_ages,
        ]  # fmt: skip
        for bucket in scheduler._prefills._buckets.values():
            self._shared.append(bucket.queue._rest)
        for tree in index.trees[0]:
            self._shared.append(getattr(tree.order, "_rules", None))
        self._shared = list({id(item): item for item in self._shared if item is not None}.values())
        self._table = {**copyreg.dispatch_table, Request: _reduce_request}
        self._set_memo()

    def names_of_shared(self) -> list[str]:
        """What all states share, in the order of its numbers."""
        return [item if isinstance(item, str) else type(item).__qualname__ for item in self._shared]

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
    return scripted_request, (request.request_id, request.arrival_s)
