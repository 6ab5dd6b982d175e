"""Read the value of a pickle opcode by opcode: nothing is imported, and the pickle's size bounds time and memory.

Only functions from the caller are called. In Python's own unpickler only the calls can be restricted. Memo numbers can
still take gigabytes, tuples can be doubled a hundred times, and the hash of nested keys can overflow the stack.
"""

from __future__ import annotations

import codecs
import io
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from unicode_fast.files.untrusted import TEXT_VARIABLE, BadFile, check_size

# Limits per pickle; objects are containers, calls and memo entries, which take memory beside the bytes.
MOST_OPCODES = 1 << 21
MOST_OBJECTS = 1 << 18
DEEPEST = 64
# Size of the value relative to the pickle, if the same object occurs several times.
MOST_SHARED = 16
_INTEGER = 1 << 64
_KEY = 1 << 31
# Opcodes whose argument is the value.
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_PLAIN = (int, float, bool, str, bytes, bytearray, type(None))


def unpickle(
    data: bytes,
    names: Mapping[tuple[str, str], Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value in a pickle of any protocol: None, numbers, text, bytes, tuples, lists, dicts, and results of `names`.

    Keys are text or integers. Python 2's text is read as latin1. The value's size bounds the time of its repr,
    comparison and hash.

    Args:
        data: the pickle.
        names: replacement of each allowed (module, name), called with unchecked arguments of the pickle. A state goes
            to the `__setstate__` of its result.
        persistent: from a persistent id to an object; None refuses persistent ids.

    Raises:
        BadFile: the data are no pickle, cut short, use other opcodes or names, or exceed a limit of size or depth.
    """
    try:
        return _Walk(names, persistent, len(data)).value(data)
    except BadFile:
        raise
    # A damaged pickle can raise any exception, but these opcodes and names have no other effect.
    except Exception as error:
        raise BadFile(f"it is a damaged pickle: {type(error).__name__}: {error!s:.100}") from error


def split_pickles(data: bytes, count: int) -> tuple[list[bytes], int]:
    """The first `count` pickles of the data, and the offset after them.

    Raises:
        BadFile: a pickle is damaged, or cut short.
    """
    stream, found = io.BytesIO(data), []
    for _ in range(count):
        start = stream.tell()
        try:
            for _ in _opcodes(stream):
                pass
        except BadFile:
            raise
        except Exception as error:
            raise BadFile(f"it holds a damaged pickle: {type(error).__name__}: {error!s:.100}") from error
        found.append(data[start : stream.tell()])
    return found, stream.tell()


def _opcodes(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Names and arguments of opcodes, as `pickletools.genops`, but also with Python 2's text beyond ASCII."""
    name, count = "", 0
    while name != "STOP":
        count += 1
        if count > MOST_OPCODES:
            raise BadFile(f"its pickle has more than {MOST_OPCODES} opcodes")
        code = stream.read(1)
        opcode = _CODES.get(code.decode("latin1"))
        if opcode is None:
            raise BadFile("its pickle is cut short" if not code else f"its pickle has the opcode {code!r}")
        name, argument = opcode.name, None
        if name == "STRING":
            quoted = stream.readline().strip()
            if len(quoted) < 2 or quoted[:1] not in b"'\"" or quoted[-1:] != quoted[:1]:
                raise BadFile("its pickle has text without quotes")
            argument = codecs.escape_decode(quoted[1:-1])[0].decode("latin1")
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield name, argument


class _Walk:
    def __init__(
        self,
        names: Mapping[tuple[str, str], Callable[..., Any]],
        persistent: Callable[[Any], Any] | None,
        size: int,
    ) -> None:
        self.names, self.persistent, self.largest = names, persistent, MOST_SHARED * size + 1000
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.objects = 0
        # Total size of the arguments of all calls, which bounds their time.
        self.given = 0
        # Depth and size of containers by id; a later object with the same id overwrites them.
        self.measures: dict[int, tuple[int, int]] = {}
        # Ids of objects in a container or from the memo: no longer filled, so no object contains itself.
        self.closed: set[int] = set()

    def value(self, data: bytes) -> Any:
        """The last value on the stack."""
        for name, argument in _opcodes(io.BytesIO(data)):
            if name in _VALUES:
                if isinstance(argument, int) and not -_INTEGER < argument < _INTEGER:
                    raise BadFile("its pickle holds an integer of more than 64 bits")
                if type(argument) is str:
                    # Text takes up to four bytes per character.
                    check_size(len(argument), TEXT_VARIABLE)
                self.stack.append(argument)
            else:
                self.do(name, argument)
        if len(self.stack) != 1 or self.marks:
            raise BadFile("its pickle does not end with one value")
        return self.stack[0]

    def do(self, name: str, argument: Any) -> None:
        """Execute one opcode on the stack."""
        stack = self.stack
        if name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.push(_EMPTY[name](), ())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.count()
            number = len(self.memo) if name == "MEMOIZE" else argument
            if number > MOST_OPCODES:
                raise BadFile(f"its pickle has memo number {number}")
            self.memo[number] = self.top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
            self.close(self.memo[argument])
        elif name in ("TUPLE", *_TUPLES):
            items = self.marked() if name == "TUPLE" else self.popped(_TUPLES[name])
            self.push(tuple(items), items)
        elif name in ("APPEND", "APPENDS"):
            items = self.popped(1) if name == "APPEND" else self.marked()
            self.open(list).extend(items)
            self.grow(items)
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.popped(2) if name == "SETITEM" else self.marked())
        elif name == "LIST":
            items = self.marked()
            self.push(list(items), items)
        elif name == "DICT":
            items = self.marked()
            self.push({}, ())
            self.set_items(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.name(*(argument.split(" ", 1) if name == "GLOBAL" else self.popped(2)))
        elif name == "REDUCE":
            self.call(*self.popped(2))
        elif name == "BUILD":
            (state,) = self.popped(1)
            self.give(state)
            self.open(object).__setstate__(state)
            self.grow((state,))
        elif name in ("BINPERSID", "PERSID") and self.persistent is not None:
            items = self.popped(1) if name == "BINPERSID" else [argument]
            self.push(self.persistent(items[0]), items)
        else:
            raise BadFile(f"its pickle has opcode {name}, which is not allowed")

    def count(self) -> None:
        """Count one more object."""
        self.objects += 1
        if self.objects > MOST_OBJECTS:
            raise BadFile(f"its pickle has more than {MOST_OBJECTS} objects")

    def top(self) -> Any:
        """The value on top of the stack."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise BadFile("its pickle takes a value from an empty stack")
        return self.stack[-1]

    def popped(self, number: int) -> list[Any]:
        """Remove and return the last values."""
        if len(self.stack) - number < (self.marks[-1] if self.marks else 0):
            raise BadFile("its pickle takes a value from an empty stack")
        items = self.stack[-number:]
        del self.stack[-number:]
        return items

    def marked(self) -> list[Any]:
        """Remove and return the values after the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def open(self, kind: type) -> Any:
        """The value on top, which can still be filled."""
        target = self.top()
        if not isinstance(target, kind) or id(target) not in self.measures or id(target) in self.closed:
            raise BadFile(f"its pickle fills a {type(target).__name__}, which is not allowed")
        return target

    def push(self, value: Any, items: Any) -> None:
        """Push a new container of these items."""
        self.count()
        self.closed.discard(id(value))
        self.measures[id(value)] = (1, 1)
        self.stack.append(value)
        self.grow(items)

    def close(self, value: Any) -> None:
        """Mark a container as complete."""
        if not isinstance(value, _PLAIN):
            self.closed.add(id(value))

    def measure(self, value: Any) -> tuple[int, int]:
        """Depth and size of a value."""
        if isinstance(value, _PLAIN):
            return 0, 1 + (len(value) if isinstance(value, (str, bytes, bytearray)) else 0)
        return self.measures.get(id(value), (0, 1))

    def grow(self, items: Any) -> None:
        """Add the items' depth and size to the container on top."""
        depth, size = self.measures[id(self.stack[-1])]
        for item in items:
            below, inside = self.measure(item)
            depth, size = max(depth, below + 1), size + inside
            self.close(item)
        if depth > DEEPEST:
            raise BadFile(f"its pickle is nested more than {DEEPEST} deep")
        if size > self.largest:
            raise BadFile(f"its pickle expands to more than {MOST_SHARED} times its size")
        self.measures[id(self.stack[-1])] = (depth, size)

    def set_items(self, items: list[Any]) -> None:
        """Set alternating keys and values."""
        target = self.open(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and 0 <= key < _KEY):
                raise BadFile(f"its pickle has a key of type {type(key).__name__}, not text or a small integer")
            target[key] = value
        self.grow(items)

    def name(self, module: Any, name: Any) -> None:
        """Push the replacement of a name."""
        if type(module) is not str or type(name) is not str or (module, name) not in self.names:
            raise BadFile(f"its pickle names {module!s:.60}.{name!s:.60}, which was not run")
        self.stack.append(self.names[module, name])

    def call(self, function: Any, arguments: Any) -> None:
        """Call a replacement with its arguments."""
        if type(arguments) is not tuple or not any(function is known for known in self.names.values()):
            raise BadFile(f"its pickle calls a {type(function).__name__}, which is not allowed")
        self.give(arguments)
        self.push(function(*arguments), arguments)

    def give(self, value: Any) -> None:
        """Count the size of a call's arguments or a state, which bounds its time."""
        self.given += self.measure(value)[1]
        if self.given > self.largest:
            raise BadFile(f"its pickle expands to more than {MOST_SHARED} times its size")
