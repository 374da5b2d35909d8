"""Executes the opcodes of a pickle over plain data only. Which globals mean what, and the files, are elsewhere.

Python's own unpicklers look globals up in modules, call them and set attributes of what they return. Here a global is
two strings, a call of it is a call of the caller's function, and attributes are set on our records alone. Sizes,
nesting and hashing are bounded, because a small pickle can ask for more memory or time than any machine has.
"""

from __future__ import annotations

import argparse
import io
import pickletools
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
    machine = _Machine(meanings, max_objects)
    file = io.BytesIO(data)
    try:
        while (code := file.read(1)) != b".":
            known = _TABLE.get(code)
            if known is None:
                raise PickleError(f"opcode {code!r} does not belong in it" if code else "ends in the middle")
            read, act = known
            if read is None:
                act(machine)
            else:
                act(machine, read(file))
        value = machine.stack.pop()
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        raise PickleError(f"damaged: {error}") from error
    check_extent(value, max(_MIN_VISITS, _VISITS_PER_BYTE * len(data)))
    return value


class _Machine:
    """The stack and memo of one pickle. The methods op_NAME are the opcodes of pickletools, in lower case."""

    def __init__(self, meanings: GlobalResolvers, max_objects: int) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.meanings = meanings
        self._num_left = max_objects

    def count(self) -> None:
        """One object more. Raises PickleError if there are too many."""
        self._num_left -= 1
        if self._num_left < 0:
            raise PickleError("holds more objects than any such file")

    def call(self, function: Any, args: Any) -> None:
        """Leave what a call returns on the stack."""
        if not isinstance(args, tuple):
            raise PickleError("the arguments of a call are no tuple")
        self.count()
        if isinstance(function, Opaque):
            self.stack.append(Opaque("a result"))
        elif isinstance(function, Global):
            self.stack.append(self.meanings.make(function, args))
        else:
            raise PickleError(f"calls a {type(function).__name__}")

    def items(self) -> list[Any]:
        """What was pushed since the last mark, taken off the stack together with the mark."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def op_proto(self, version: int) -> None:
        pass

    op_frame = op_proto

    def op_mark(self) -> None:
        self.count()
        self.marked.append(self.stack)
        self.stack = []

    def op_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.items()

    def op_pop_mark(self) -> None:
        self.items()

    def op_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def op_none(self) -> None:
        self.stack.append(None)

    def op_newtrue(self) -> None:
        self.stack.append(True)

    def op_newfalse(self) -> None:
        self.stack.append(False)

    def push(self, value: Any) -> None:
        """A value that its opcode holds."""
        self.stack.append(value)

    op_binint = op_binint1 = op_binint2 = op_float = op_binfloat = push
    op_string = op_binstring = op_short_binstring = push
    op_unicode = op_binunicode = op_short_binunicode = op_binunicode8 = push
    op_binbytes = op_short_binbytes = op_binbytes8 = op_bytearray8 = push

    def op_int(self, value: int) -> None:
        if value.bit_length() > _MAX_INT_BITS:
            raise PickleError(f"an integer of {value.bit_length()} bits")
        self.stack.append(value)

    op_long = op_long1 = op_long4 = op_int

    def op_empty_list(self) -> None:
        self.count()
        self.stack.append([])

    op_empty_set = op_empty_list  # as a list: members need not be hashed

    def op_list(self) -> None:
        items = self.items()
        self.stack.append(items)

    op_frozenset = op_list

    def op_append(self) -> None:
        item = self.stack.pop()
        _extend(self.stack[-1], [item])

    def op_appends(self) -> None:
        items = self.items()
        _extend(self.stack[-1], items)

    op_additems = op_appends

    def op_empty_tuple(self) -> None:
        self.stack.append(())

    def op_tuple(self) -> None:
        items = self.items()
        self.stack.append(tuple(items))

    def op_tuple1(self) -> None:
        self.count()
        self.stack[-1:] = [(self.stack[-1],)]

    def op_tuple2(self) -> None:
        self.count()
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self) -> None:
        self.count()
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_empty_dict(self) -> None:
        self.count()
        self.stack.append({})

    def op_dict(self) -> None:
        items = self.items()
        self.stack.append({})
        _set_items(self.stack[-1], items)

    def op_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def op_setitems(self) -> None:
        items = self.items()
        _set_items(self.stack[-1], items)

    def op_get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"refers to value {index}, which it has not made")
        self.stack.append(self.memo[index])

    op_binget = op_long_binget = op_get

    def op_put(self, index: int) -> None:
        self.count()
        self.memo[index] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self) -> None:
        self.count()
        self.memo[len(self.memo)] = self.stack[-1]

    def op_global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self.stack.append(self.meanings.find(Global(module, name)))

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("names a class by something other than text")
        self.stack.append(self.meanings.find(Global(module, name)))

    def op_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    op_newobj = op_reduce

    def op_newobj_ex(self) -> None:
        _, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def op_inst(self, names: str) -> None:
        args = tuple(self.items())
        self.op_global(names)
        self.call(self.stack.pop(), args)

    def op_obj(self) -> None:
        function, *args = self.items()
        self.call(function, tuple(args))

    def op_build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    def op_binpersid(self) -> None:
        if self.meanings.persistent is None:
            raise PickleError("refers to something outside of it")
        self.stack.append(self.meanings.persistent(self.stack.pop()))


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


# By opcode: what reads its argument, and what it does. Extensions, out-of-band buffers and PERSID have no place here.
_TABLE: dict[bytes, tuple[Callable[[Any], Any] | None, Callable[..., None]]] = {
    opcode.code.encode("latin-1"): (opcode.arg.reader if opcode.arg else None, act)
    for opcode in pickletools.opcodes
    if (act := getattr(_Machine, f"op_{opcode.name.lower()}", None)) is not None
}
