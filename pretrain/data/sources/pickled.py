"""Pickled: the content of CIFAR's pickle files, without unpickling.

A pickle is a program. Here its opcodes are read by Python's `pickletools`, and the few that build dictionaries, lists,
strings, numbers and numpy arrays are followed on a stack of our own. Nothing is imported and nothing is called: what
a pickle wants to call becomes a `Call` that lies there as data; only numpy's way to write an array of bytes is read.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np


class PickleRefusedError(ValueError):
    """The pickle holds something other than plain data and byte arrays, or is damaged."""


@dataclass
class Name:
    """A global that the pickle names."""

    path: str


@dataclass
class Call:
    """A call that the pickle asks for, and the state it sets on the result. Not carried out."""

    function: object
    arguments: object
    state: object = None


MARK = object()
PUSHED_AS_IS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
LATIN = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # Python 2's str: bytes
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
IGNORED = {"PROTO", "FRAME"}


class _Machine:
    """The stack and memo of a pickle being followed."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def to_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in PUSHED_AS_IS:
            self.stack.append(argument)
        elif name in LATIN:
            self.stack.append(argument.encode("latin-1"))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name == "MARK":
            self.stack.append(MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name not in IGNORED:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        if name in ("SETITEMS", "APPENDS", "TUPLE"):
            self._fill(name, self.to_mark())
        elif name in ("SETITEM", "APPEND"):
            count = 2 if name == "SETITEM" else 1
            items = self.stack[-count:]
            del self.stack[-count:]
            self._fill(name + "S", items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif name == "GLOBAL":
            self.stack.append(Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, attribute = self.stack[-2:]
            self.stack[-2:] = [Name(f"{module}.{attribute}")]
        elif name == "REDUCE":
            self.stack[-2:] = [_called(*self.stack[-2:])]
        elif name == "BUILD":
            self.stack[-2].state = self.stack[-1]
            del self.stack[-1]
        else:
            raise PickleRefusedError(f"opcode {name} has no place in a file of images")

    def _fill(self, name: str, items: list[Any]) -> None:
        if name == "TUPLE":
            self.stack.append(tuple(items))
        elif name == "APPENDS":
            self.stack[-1].extend(items)
        else:
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _called(function: object, arguments: object) -> object:
    """A call as data. Python 3 writes bytes for Python 2 as the call `_codecs.encode(text, "latin1")`: that is read."""
    if getattr(function, "path", None) != "_codecs.encode" or not isinstance(arguments, tuple):
        return Call(function, arguments)
    text, encoding = arguments
    return text.encode("latin-1") if encoding == "latin1" else Call(function, arguments)


def load_plain(content: bytes) -> Any:
    """The object that a pickle describes: dictionaries, lists, tuples, strings, numbers, uint8 arrays.

    Raises:
        PickleRefusedError: it is damaged, or asks for anything else.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return _plain(machine.stack[-1])
            machine.step(opcode.name, argument)
    except PickleRefusedError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise PickleRefusedError(f"damaged: {error}") from error
    raise PickleRefusedError("ends before its end")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Name, Call)):
        return _array(value)
    return value


def _text(key: Any) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")


def _array(value: Name | Call) -> np.ndarray:
    """The uint8 array that a call of numpy's `_reconstruct` with its state describes."""
    wanted = value.path if isinstance(value, Name) else getattr(value.function, "path", "something")
    if isinstance(value, Call) and wanted in RECONSTRUCT and isinstance(value.state, tuple):
        _, shape, dtype, fortran, raw = value.state
        is_bytes = (
            isinstance(dtype, Call) and isinstance(dtype.arguments, tuple) and dtype.arguments[0] in (b"u1", "u1")
        )
        if is_bytes and isinstance(raw, bytes) and len(raw) == int(np.prod(shape, dtype=np.int64)):
            return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise PickleRefusedError(f"it wants {wanted} from Python; only byte arrays are read")
