"""Transfer of values between a program written by a model and the tests that judge it: data only,
so that nothing received can run code or affect a comparison. Standard library only.

Plain types are transferred unchanged; a subclass becomes the plain type it extends, without its
overridden methods. NumPy arrays and scalars keep their dtype. Iterators stay in their process and
yield one value per request.
"""

import builtins
import collections
import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

_LENGTH = struct.Struct("!I")
_MOST = 1 << 26  # maximum bytes of a message


def _pairs(value: Any) -> list[list[Any]]:
    return [[key, value[key]] for key in value]


def _iso(value: Any) -> str:
    return value.isoformat()


# Type name -> conversions to JSON and back. Modules are imported when a value needs them.
_KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "builtins.list": (list, list),
    "builtins.tuple": (list, tuple),
    "builtins.set": (list, set),
    "builtins.frozenset": (list, frozenset),
    "collections.deque": (list, collections.deque),
    "collections.Counter": (_pairs, lambda v: collections.Counter(dict(v))),
    "collections.OrderedDict": (_pairs, collections.OrderedDict),
    "builtins.dict": (_pairs, dict),
    "builtins.dict_keys": (list, lambda v: dict.fromkeys(v).keys()),
    "builtins.dict_values": (list, lambda v: dict(enumerate(v)).values()),
    "builtins.dict_items": (lambda v: [*map(list, v)], lambda v: dict(v).items()),
    "builtins.bytes": (bytes.hex, bytes.fromhex),
    "builtins.bytearray": (bytearray.hex, bytearray.fromhex),
    "builtins.complex": (lambda v: [v.real, v.imag], lambda v: complex(*v)),
    "builtins.range": (lambda v: [v.start, v.stop, v.step], lambda v: range(*v)),
    "decimal.Decimal": (str, lambda v: __import__("decimal").Decimal(v)),
    "fractions.Fraction": (
        lambda v: [v.numerator, v.denominator],
        lambda v: __import__("fractions").Fraction(*v),
    ),
    "datetime.datetime": (_iso, lambda v: __import__("datetime").datetime.fromisoformat(v)),
    "datetime.date": (_iso, lambda v: __import__("datetime").date.fromisoformat(v)),
    "datetime.time": (_iso, lambda v: __import__("datetime").time.fromisoformat(v)),
    "datetime.timedelta": (
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: __import__("datetime").timedelta(*v),
    ),
    "builtins.int": (hex, lambda v: int(v, 16)),
    "builtins.float": (float.hex, float.fromhex),
    "builtins.str": (str.__str__, str),
}
_NUMBERS = "biufc"  # kinds of NumPy dtypes that contain only bits


class Stays(TypeError):
    """A value that is not plain data and cannot be transferred; the message names its type."""


def encode(value: Any, keep: Callable[[Iterator[Any]], int] | None = None) -> Any:
    """JSON for a value. `keep` returns a number for an iterator. Raises Stays for anything but
    plain data."""
    if value is None or value is True or value is False:
        return value
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype"):
        import numpy as np

        array = np.ascontiguousarray(value)
        if array.dtype.kind in _NUMBERS:
            shape = list(np.shape(value))
            return ["numpy", [array.dtype.str, shape, array.tobytes().hex()]]
    bases = (f"{base.__module__}.{base.__qualname__}" for base in type(value).__mro__)
    if (kind := next((base for base in bases if base in _KINDS), None)) is not None:
        inside = _KINDS[kind][0](value)
        return [kind, _each(inside, keep) if isinstance(inside, list) else inside]
    if keep is not None and isinstance(value, Iterator):
        return ["iterator", keep(value)]
    raise Stays(f"a {type(value).__name__}")


def _each(values: list[Any], keep: Callable[[Iterator[Any]], int] | None) -> list[Any]:
    return [encode(value, keep) for value in values]


def decode(given: Any, iterate: Callable[[int], Iterator[Any]] | None = None) -> Any:
    """The value of encode's JSON; `iterate` makes an iterator from a number. Raises ValueError,
    TypeError or KeyError for invalid input."""
    if given is None or given is True or given is False:
        return given
    name, inside = given
    if name == "numpy":
        import numpy as np

        dtype, shape, data = inside
        if np.dtype(dtype).kind not in _NUMBERS:
            raise ValueError(f"dtype {dtype}")
        return np.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()[()]
    if name == "iterator" and iterate is not None:
        return iterate(inside)
    if isinstance(inside, list):
        inside = [decode(value, iterate) for value in inside]
    return _KINDS[name][1](inside)


def mutate(old: Any, new: Any) -> None:
    """Update a mutable argument to its state after the call."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set | collections.deque):
        old.clear()
        (old.extend if isinstance(old, collections.deque) else old.update)(new)


def encode_exception(error: BaseException) -> list[Any]:
    """Names of the exception's built-in base types, and its arguments."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        arguments = [encode(argument) for argument in error.args]
    except (TypeError, ValueError, RecursionError):
        arguments = [encode(str(error))]
    return [names, arguments]


def decode_exception(given: Any) -> BaseException:
    names, arguments = given
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            # StopIteration would end the tests' own loops early.
            kind = RuntimeError if issubclass(kind, StopIteration) else kind
            try:
                return kind(*map(decode, arguments))
            except TypeError:  # it requires more arguments (UnicodeDecodeError): use its base class
                continue
    raise ValueError(names)


def told(error: BaseException) -> str:
    """Format an exception as `ValueError: seven`, on one line of at most 500 characters."""
    text = str(error)
    name = type(error).__name__
    return " ".join((f"{name}: {text}" if text else name).split())[:500]


class Channel:
    """Messages over two pipes: JSON preceded by its length. Raises EOFError when the other end is
    closed or sends something else."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *message: Any) -> None:
        text = json.dumps(message).encode()
        left = memoryview(_LENGTH.pack(len(text)) + text)
        while left:
            try:
                left = left[os.write(self.writer, left) :]
            except BrokenPipeError as error:
                raise EOFError from error

    def receive(self) -> list[Any]:
        (length,) = _LENGTH.unpack(read_exactly(self.reader, _LENGTH.size))
        if length > _MOST:
            raise EOFError
        try:
            message = json.loads(read_exactly(self.reader, length))
        except (ValueError, RecursionError) as error:
            raise EOFError from error
        if not isinstance(message, list) or not message:
            raise EOFError
        return message


def read_exactly(fd: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = os.read(fd, min(length - len(found), 1 << 20))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)
