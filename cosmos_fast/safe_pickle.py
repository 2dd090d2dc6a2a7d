"""Reads the pickles inside weight files as data: nothing named in them is ever imported or called.

A pickle is a program. This module walks its opcodes and builds dictionaries, lists and plain records; every
global it names must stand in a table given by the caller, and that table maps it to a function of ours. There
is no path from a name in the file to an import, so a hostile file can only be refused.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_fast.formats import CheckpointError


class UnsafePickle(CheckpointError):
    """The pickle names something outside the table; `name` is that global."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        super().__init__(
            f"{path or 'pickle'}: only tensors and plain containers are read, got '{name}'. "
            "The file may run code when unpickled, so it was not opened."
        )
        self.name = name


class DamagedPickle(CheckpointError):
    """The opcode stream does not make sense: cut short or corrupted."""


@dataclass(frozen=True)
class Maker:
    """A function of ours that stands for a callable global of the pickle."""

    make: Callable[..., Any]


@dataclass(eq=False)
class Record:
    """An object of the file, kept as its class name, arguments and state, never instantiated."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass
class _Machine:
    table: Mapping[str, Any]
    persistent: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def find(self, module: Any, name: Any) -> Any:
        full = f"{module}.{name}"
        if full not in self.table:
            raise UnsafePickle(full)
        return self.table[full]

    def call(self, maker: Any, args: Any) -> Any:
        if not isinstance(maker, Maker) or not isinstance(args, tuple):
            raise UnsafePickle(f"call of {type(maker).__name__}")
        return maker.make(*args)


def record(name: str) -> Maker:
    """A table entry that keeps calls of `name` as a Record."""
    return Maker(lambda *args: Record(name, args))


def load(data: bytes, table: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle. `table` maps "module.name" to a Maker or to the plain value that stands for it.

    `persistent` turns a persistent id (a tensor storage) into a value. Raises UnsafePickle for a global
    outside the table and DamagedPickle for a stream that cannot be followed.
    """
    machine = _Machine(table, persistent or _no_persistent_ids)
    try:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise UnsafePickle(f"opcode {opcode.name}")
            step(machine, arg)
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise DamagedPickle(
            f"pickle: cannot be followed ({error}). The file is damaged or cut short."
        ) from None
    raise DamagedPickle("pickle: ends before its last opcode. The file is cut short.")


def _no_persistent_ids(value: Any) -> Any:
    raise UnsafePickle("persistent id")


def _push_constant(value: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, arg: m.stack.append(value())


def _push_arg(m: _Machine, arg: Any) -> None:
    m.stack.append(arg)


def _collect(build: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, arg: m.stack.append(build(m.since_mark()))


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def step(m: _Machine, arg: Any) -> None:
        if len(m.stack) < count:
            raise IndexError("stack is too short")
        items = tuple(m.stack[-count:])
        del m.stack[-count:]
        m.stack.append(items)

    return step


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _put_items(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if not isinstance(target, dict):
        raise TypeError(f"items set on a {type(target).__name__}")
    target.update(_pairs(items))


def _extend(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(items)
    else:
        raise TypeError(f"items appended to a {type(target).__name__}")


def _pop_two(m: _Machine) -> list[Any]:
    value, key = m.stack.pop(), m.stack.pop()
    return [key, value]


def _global(m: _Machine, arg: str) -> None:
    module, _, name = arg.partition(" ")
    m.stack.append(m.find(module, name))


def _stack_global(m: _Machine, arg: Any) -> None:
    m.stack.append(m.find(*_pop_two(m)))


def _call(m: _Machine, arg: Any) -> None:
    m.stack.append(m.call(*_pop_two(m)))


def _call_with_keywords(m: _Machine, arg: Any) -> None:
    keywords = m.stack.pop()
    if keywords:
        raise UnsafePickle("call with keywords")
    _call(m, arg)


def _build(m: _Machine, arg: Any) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Record):
        target.state = state
    elif not isinstance(target, OrderedDict):  # a state dict's own attributes (its metadata) are not weights
        raise UnsafePickle(f"state of {type(target).__name__}")


def _mark(m: _Machine, arg: Any) -> None:
    m.marks.append(len(m.stack))


def _pop(m: _Machine, arg: Any) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


def _put(m: _Machine, arg: Any) -> None:
    m.memo[len(m.memo) if arg is None else int(arg)] = m.stack[-1]


def _get(m: _Machine, arg: Any) -> None:
    m.stack.append(m.memo[int(arg)])


def _persistent(m: _Machine, arg: Any) -> None:
    m.stack.append(m.persistent(m.stack.pop()))


def _nothing(m: _Machine, arg: Any) -> None:
    return None


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda m, arg: m.since_mark().clear(),
    "DUP": lambda m, arg: m.stack.append(m.stack[-1]),
    "NONE": _push_constant(lambda: None),
    "NEWTRUE": _push_constant(lambda: True),
    "NEWFALSE": _push_constant(lambda: False),
    "EMPTY_LIST": _push_constant(list),
    "EMPTY_TUPLE": _push_constant(tuple),
    "EMPTY_DICT": _push_constant(dict),
    "EMPTY_SET": _push_constant(set),
    "LIST": _collect(list),
    "TUPLE": _collect(tuple),
    "DICT": _collect(_pairs),
    "FROZENSET": _collect(frozenset),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda m, arg: _extend(m, [m.stack.pop()]),
    "APPENDS": lambda m, arg: _extend(m, m.since_mark()),
    "ADDITEMS": lambda m, arg: _extend(m, m.since_mark()),
    "SETITEM": lambda m, arg: _put_items(m, _pop_two(m)),
    "SETITEMS": lambda m, arg: _put_items(m, m.since_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "NEWOBJ_EX": _call_with_keywords,
    "BUILD": _build,
    "BINPERSID": _persistent,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        ),
        _push_arg,
    ),
}
