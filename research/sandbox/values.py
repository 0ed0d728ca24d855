"""Plain data as JSON text: what passes between a program and its tests.

Unlike pickle's and marshal's, no such text can do anything in the process that reads it but give such values. Values
of subclasses arrive as the plain class: a dictionary with defaults is a dictionary, and a number that claims to equal
everything is just its number. Views of a dictionary arrive as those of one with the same content, an iterator as one
over the values that it gives, and a binary file in memory as a copy of it.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from io import BytesIO
from itertools import islice
from typing import Any

_ITERATED = 100_000  # values of an iterator, which can be endless
_JSON_INTEGERS = 2**63  # larger ones travel as hexadecimal digits, whose number Python does not limit


class NotPlainError(TypeError):
    """A value is no plain data, for example a function or an object of a class of one's own."""


def dumps(value: Any) -> str:
    """One line of JSON.

    Raises:
        NotPlainError: the value, or one within it, is not plain data.
        RecursionError: it is nested too deeply, or contains itself.
    """
    return json.dumps(_pack(value))


def loads(text: str) -> Any:
    """The value of a line that `dumps` made.

    Raises:
        ValueError: it is no such line.
        RecursionError: it is nested too deeply.
    """
    try:
        return _unpack(json.loads(text))
    except (ValueError, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001 - a hostile program wrote it, and it can be wrong in any way
        raise ValueError(f"no plain data: {error!r}") from None


def _pack(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind, pack in _PACK.items():
        if isinstance(value, kind):
            return pack(value)
    raise NotPlainError(f"{type(value).__name__} is no plain data")


def _pack_integer(value: int) -> Any:
    number = int(value)
    return number if -_JSON_INTEGERS < number < _JSON_INTEGERS else {"int": hex(number)}


def _pack_all(values: Iterable[Any]) -> list[Any]:
    return [_pack(value) for value in values]


def _pack_iterator(values: Iterator[Any]) -> dict[str, Any]:
    packed = _pack_all(islice(values, _ITERATED + 1))
    if len(packed) > _ITERATED:
        raise NotPlainError(f"an iterator of more than {_ITERATED} values is no plain data")
    return {"iterator": packed}


def _unpack(packed: Any) -> Any:
    if isinstance(packed, list):
        return [_unpack(item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    return _UNPACK[kind](content)


def _dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    return {_unpack(key): _unpack(item) for key, item in pairs}


def _file(digits: str, position: int) -> BytesIO:
    file = BytesIO(bytes.fromhex(digits))
    file.seek(position)
    return file


_PACK: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: _pack_integer,
    float: float,
    list: _pack_all,
    tuple: lambda value: {"tuple": _pack_all(value)},
    set: lambda value: {"set": _pack_all(value)},
    frozenset: lambda value: {"frozenset": _pack_all(value)},
    Counter: lambda value: {"Counter": [_pack_all(pair) for pair in dict.items(value)]},
    dict: lambda value: {"dict": [_pack_all(pair) for pair in value.items()]},
    deque: lambda value: {"deque": [_pack_all(value), value.maxlen]},
    type({}.keys()): lambda value: {"keys": _pack_all(value)},
    type({}.values()): lambda value: {"values": _pack_all(value)},
    type({}.items()): lambda value: {"items": [_pack_all(pair) for pair in value]},
    bytes: lambda value: {"bytes": value.hex()},
    bytearray: lambda value: {"bytearray": value.hex()},
    complex: lambda value: {"complex": [value.real, value.imag]},
    range: lambda value: {"range": _pack_all((value.start, value.stop, value.step))},
    Decimal: lambda value: {"Decimal": Decimal.__str__(value)},
    Fraction: lambda value: {"Fraction": _pack_all((value.numerator, value.denominator))},
    BytesIO: lambda value: {"BytesIO": [value.getvalue().hex(), value.tell()]},
    Iterator: _pack_iterator,
}
_UNPACK: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "tuple": lambda content: tuple(_unpack(content)),
    "set": lambda content: set(_unpack(content)),
    "frozenset": lambda content: frozenset(_unpack(content)),
    "Counter": lambda content: Counter(_dict(content)),
    "dict": _dict,
    "deque": lambda content: deque(_unpack(content[0]), content[1]),
    "keys": lambda content: dict.fromkeys(_unpack(content)).keys(),
    "values": lambda content: dict(enumerate(_unpack(content))).values(),
    "items": lambda content: _dict(content).items(),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda content: complex(*content),
    "range": lambda content: range(*_unpack(content)),
    "Decimal": Decimal,
    "Fraction": lambda content: Fraction(*_unpack(content)),
    "BytesIO": lambda content: _file(*content),
    "iterator": lambda content: iter(_unpack(content)),
}
