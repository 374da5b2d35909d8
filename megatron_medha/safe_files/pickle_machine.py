"""Unpickles plain data only: Python's own unpickler with a table of its own. safe_pickle.py: what globals mean, files.

pickle.Unpickler looks globals up in modules, calls them and sets attributes of what they return. Here a global is two
strings, a call of it is a call of the caller's function, and attributes are set on our records alone. Sizes,
nesting and hashing are bounded, because a small pickle can ask for more memory or time than any machine has.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_MAX_DEPTH = 64
_MAX_INT_BITS = 2048
# A pickle may refer to one of its parts again and again, within reason.
_MIN_VISITS = 1_000_000
_VISITS_PER_BYTE = 16
# Larger ones, and tuples, can be chosen to have one hash: to fill a dict with them takes minutes.
_MAX_INT_KEY = 2**60


class PickleError(Exception):
    """The pickle is damaged, or asks for what plain data never needs."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name, never the object itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


class Opaque:
    """Stands for an object of a class that is not on the allow-list."""

    __slots__ = ("_what",)

    def __init__(self, what: object) -> None:
        self._what = what

    def __repr__(self) -> str:
        return f"<{self._what}, not read>"


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class on the allow-list: the attributes it was saved with, or its state when that was a tuple."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    state: tuple[Any, ...] = ()


class SavedNamespace(argparse.Namespace):
    """The arguments of a training script, read from a file."""


class GlobalResolvers(NamedTuple):
    """What a pickle's names mean; each of these functions may raise PickleError."""

    find: Callable[[Global], Any]                    # the value a name stands for; the Global itself if it is called
    make: Callable[[Global, tuple[Any, ...]], Any]   # an object, from its class or function and the arguments
    persistent: Callable[[Any], Any] | None = None   # what lies outside of the pickle under that id


def unpickle(data: bytes, meanings: GlobalResolvers, max_objects: int = 2_000_000) -> Any:
    """The plain data in a pickle. Raises PickleError.

    max_objects: containers, objects and values to come back to; each takes a byte of the pickle and 100 of memory.
    """
    try:
        value = _PlainUnpickler(data, meanings, max_objects).load()
    except KeyError as error:
        raise PickleError(f"opcode {error} does not belong in it") from error
    except (LookupError, ValueError, TypeError, OverflowError, struct.error, pickle.UnpicklingError) as error:
        raise PickleError(f"damaged: {error}") from error
    except EOFError as error:
        raise PickleError("ends in the middle") from error
    check_extent(value, max(_MIN_VISITS, _VISITS_PER_BYTE * len(data)))
    return value


class _PlainUnpickler(pickle._Unpickler):
    """Has only the opcodes of `dispatch`, below: those that look values up, hash, call or change them are ours."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, meanings: GlobalResolvers, max_objects: int) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._meanings = meanings
        self._num_left = max_objects

    def find_class(self, module: str, name: str) -> Any:
        return self._meanings.find(Global(module, name))

    def persistent_load(self, pid: Any) -> Any:
        if self._meanings.persistent is None:
            raise PickleError("refers to something outside of it")
        return self._meanings.persistent(pid)

    def count(self) -> None:
        """One object more. Raises PickleError if there are too many."""
        self._num_left -= 1
        if self._num_left < 0:
            raise PickleError("holds more objects than any such file")

    def load_append(self) -> None:
        item = self.stack.pop()
        _extend(self.stack[-1], [item])

    def load_appends(self) -> None:
        items = self.pop_mark()
        _extend(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _set_items(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise PickleError("the arguments of a call are no tuple")
        self._instantiate(function, args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, function: Any, args: Iterable[Any]) -> None:
        self.count()
        if isinstance(function, Opaque):
            self.append(Opaque("a result"))
        elif isinstance(function, Global):
            self.append(self._meanings.make(function, tuple(args)))
        else:
            raise PickleError(f"calls a {type(function).__name__}")

    def load_build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def act(machine: _PlainUnpickler) -> None:
        machine.count()
        load(machine)

    return act


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def act(machine: _PlainUnpickler) -> None:
        load(machine)
        if (num_bits := machine.stack[-1].bit_length()) > _MAX_INT_BITS:
            raise PickleError(f"an integer of {num_bits} bits")

    return act


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise PickleError(f"appends to a {type(target).__name__}")


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, Opaque):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise PickleError(f"sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key if _may_be_key(key) else Opaque("a key")] = value


def _may_be_key(key: Any) -> bool:
    return isinstance(key, str | bytes | Record | None) or (isinstance(key, int) and abs(key) < _MAX_INT_KEY)


def _set_state(target: Any, state: Any) -> None:
    """What __setstate__ would do; plain containers and opaque objects have no attributes that anybody reads."""
    if isinstance(target, SavedNamespace):
        fields = vars(target)
    elif isinstance(target, Record):
        fields = target.fields
    elif isinstance(target, Opaque | dict | list):
        return
    else:
        raise PickleError(f"sets attributes of {target if isinstance(target, Global) else type(target).__name__}")
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict | None):
        states: Iterable[Any] = state  # attributes, then slots
    elif isinstance(state, tuple) and isinstance(target, Record):
        target.state = state
        return
    else:
        states = (state,)
    for part in states:
        if not isinstance(part, dict | None):
            raise PickleError(f"attributes given as a {type(part).__name__}")
        fields.update((key, value) for key, value in (part or {}).items() if isinstance(key, str))


def check_extent(root: Any, max_visits: int) -> None:
    """Raise PickleError if it contains itself, or is far larger written out than in memory: to print it never ends."""
    walks = [iter((root,))]
    while walks:
        for value in walks[-1]:
            max_visits -= 1
            inner: Iterable[Any] = ()
            if isinstance(value, list | tuple):
                inner = value
            elif isinstance(value, dict):
                inner = value.values()
            elif isinstance(value, Record):
                inner = (*value.fields.values(), value.state)
            elif isinstance(value, SavedNamespace):
                inner = vars(value).values()
            if inner:
                walks.append(iter(inner))
                break
        else:
            walks.pop()
        if len(walks) > _MAX_DEPTH:
            raise PickleError(f"nested more than {_MAX_DEPTH} deep, or without end")
        if max_visits < 0:
            raise PickleError("refers to its own parts too often")


# Opcodes of which Python's own code is used. Whatever is not named here has no place: extensions, out-of-band buffers.
_PLAIN = """
    PROTO STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING
    SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE
    TUPLE LIST GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID INST OBJ
"""
_COUNTED = "MARK EMPTY_LIST EMPTY_DICT TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE"
_INTEGERS = "INT LONG LONG1 LONG4"


def _pythons(name: str) -> Callable[[Any], Any]:
    return pickle._Unpickler.dispatch[_code(name)]


def _code(name: str) -> int:
    return ord(getattr(pickle, name))


_ACTS: dict[str, Callable[[Any], Any]] = {
    **{name: _pythons(name) for name in _PLAIN.split()},
    **{name: _counted(_pythons(name)) for name in _COUNTED.split()},
    **{name: _bounded(_pythons(name)) for name in _INTEGERS.split()},
    "FRAME": lambda machine: machine.read(8),  # its length
    "BYTEARRAY8": _pythons("BINBYTES8"),  # Python's own takes the memory before it reads
    "EMPTY_SET": _counted(_pythons("EMPTY_LIST")),  # as a list: members need not be hashed
    "FROZENSET": _pythons("LIST"),
    "ADDITEMS": _PlainUnpickler.load_appends,
    "APPEND": _PlainUnpickler.load_append,
    "APPENDS": _PlainUnpickler.load_appends,
    "DICT": _PlainUnpickler.load_dict,
    "SETITEM": _PlainUnpickler.load_setitem,
    "SETITEMS": _PlainUnpickler.load_setitems,
    "REDUCE": _PlainUnpickler.load_reduce,
    "NEWOBJ": _PlainUnpickler.load_reduce,
    "NEWOBJ_EX": _PlainUnpickler.load_newobj_ex,
    "BUILD": _PlainUnpickler.load_build,
}
_PlainUnpickler.dispatch = {_code(name): act for name, act in _ACTS.items()}
