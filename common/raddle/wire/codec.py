"""Protobuf messages <-> the model's frozen dataclasses, by field name.

In goes a message or a dataclass, out comes the other. Both sides carry the same field names (a
test holds every pair to that), so one generic translation serves them all; it is compiled once a
class. Text <-> StrEnum, wire enums <-> StrEnum (prefix stripped), Timestamp and Duration <->
seconds, map<string, string> <-> sorted pairs. `schema_version` stays on the wire's side.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, cast

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

T = TypeVar("T")
_NANOS = 1_000_000_000


class CodecError(ValueError):
    """A value that the other side does not know, for example a newer enum value."""


def to_message(value: Any, message_type: type[Message]) -> Any:
    """Build a message of `message_type` from a dataclass with the same field names."""
    message = message_type()
    _fill(value, message)
    return message


def from_message(message: Message, value_type: type[T]) -> T:
    """Build a `value_type` dataclass from a message.

    Raises:
        CodecError: an enum value or word is unknown here.
    """
    arguments = {
        name: read(getattr(message, name))
        for name, read in _readers(cast("Hashable", value_type), cast("Hashable", type(message)))
    }
    return value_type(**arguments)


def _fill(value: Any, message: Message) -> None:
    for name, write in _writers(cast("Hashable", type(value)), cast("Hashable", type(message))):
        write(message, getattr(value, name))


def _seconds_of(moment: Any) -> float:
    return float(moment.seconds) + float(moment.nanos) / _NANOS


def _set_seconds(target: Any, seconds: float) -> None:
    whole, nanos = divmod(round(seconds * _NANOS), _NANOS)
    target.seconds, target.nanos = whole, nanos


def _enum_prefix(enum: EnumDescriptor) -> str:
    name = enum.name
    words = "".join(f"_{c}" if c.isupper() else c for c in name).strip("_")
    return f"{words.upper()}_"


def _is_moment(field: FieldDescriptor) -> bool:
    message = field.message_type
    return message is not None and message.full_name in {
        timestamp_pb2.Timestamp.DESCRIPTOR.full_name,
        duration_pb2.Duration.DESCRIPTOR.full_name,
    }


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _inner_type(hint: Any) -> tuple[Any, bool]:
    """(element type, is optional) of `X`, `X | None`, `tuple[X, ...]`."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner, True
    if origin is tuple:
        return typing.get_args(hint)[0], False
    return hint, False


@cache
def _pairs(value_type: Any, message_type: Any) -> tuple[tuple[str, Any, FieldDescriptor], ...]:
    assert is_dataclass(value_type)
    hints = typing.get_type_hints(value_type)
    by_name = message_type.DESCRIPTOR.fields_by_name
    return tuple((f.name, hints[f.name], by_name[f.name]) for f in fields(value_type))


@cache
def _readers(value_type: Any, message_type: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    pairs = _pairs(value_type, message_type)
    return tuple((name, _reader(hint, field)) for name, hint, field in pairs)


def _reader(hint: Any, field: FieldDescriptor) -> Callable[[Any], Any]:
    if _is_map(field):
        return lambda value: tuple(sorted(value.items()))
    inner, optional = _inner_type(hint)
    one = _element_reader(inner, field)
    if field.is_repeated:
        return tuple if one is None else lambda value: tuple(map(one, value))
    if optional and one is not None:
        return lambda value: one(value) if value.ByteSize() else None
    return (lambda value: value) if one is None else one


def _element_reader(inner: Any, field: FieldDescriptor) -> Callable[[Any], Any] | None:
    """None: the wire's value is the model's value."""
    if _is_moment(field):
        return _seconds_of
    if field.message_type is not None:
        return lambda value: from_message(value, inner)
    if field.enum_type is not None:
        return _enum_reader(inner, field.enum_type)
    if isinstance(inner, type) and issubclass(inner, StrEnum):
        return lambda value: _word(inner, value)
    return None


def _word(kind: type[StrEnum], value: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise CodecError(f"{value!r} is no {kind.__name__}; known are: {known}") from None


def _enum_reader(kind: type[StrEnum], enum: EnumDescriptor) -> Callable[[int], StrEnum]:
    prefix = _enum_prefix(enum)
    table = {v.number: kind(v.name.removeprefix(prefix)) for v in enum.values}

    def read(number: int) -> StrEnum:
        if number not in table:
            raise CodecError(f"{number} is no {kind.__name__} known here")
        return table[number]

    return read


@cache
def _writers(
    value_type: Any, message_type: Any
) -> tuple[tuple[str, Callable[[Any, Any], None]], ...]:
    pairs = _pairs(value_type, message_type)
    return tuple((name, _writer(field)) for name, _, field in pairs)


def _writer(field: FieldDescriptor) -> Callable[[Any, Any], None]:
    name = field.name
    if _is_map(field):
        return lambda message, value: getattr(message, name).update(dict(value))
    if field.is_repeated:
        return _repeated_writer(field)
    if _is_moment(field):
        return lambda message, value: _set_seconds(getattr(message, name), value) if value else None
    if field.message_type is not None:
        return lambda message, value: _fill_present(value, getattr(message, name))
    if field.enum_type is not None:
        numbers = _numbers(field.enum_type)
        return lambda message, value: setattr(message, name, numbers[value])
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return lambda message, value: setattr(message, name, value)
        return lambda message, value: setattr(message, name, str(value))
    return lambda message, value: setattr(message, name, value)


def _repeated_writer(field: FieldDescriptor) -> Callable[[Any, Any], None]:
    name = field.name
    if field.message_type is not None:

        def write_messages(message: Any, values: Any) -> None:
            target = getattr(message, name)
            for value in values:
                _fill(value, target.add())

        return write_messages
    if field.enum_type is not None:
        numbers = _numbers(field.enum_type)
        return lambda message, values: getattr(message, name).extend(numbers[v] for v in values)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return lambda message, values: getattr(message, name).extend(str(v) for v in values)
    return lambda message, values: getattr(message, name).extend(values)


def _fill_present(value: Any, message: Any) -> None:
    if value is None:
        return
    message.SetInParent()
    if type(value) in _SHARED:
        _fill_shared(value, message)
    else:
        _fill(value, message)


def share(*value_types: type) -> None:
    """Remember the bytes of values of these classes: frozen, large, and in many records."""
    _SHARED.update(value_types)


_SHARED: set[type] = set()
_SHARED_MAX = 32_768
_shared_bytes: dict[int, tuple[Any, bytes]] = {}


def _fill_shared(value: Any, message: Any) -> None:
    known = _shared_bytes.get(id(value))
    # The value is kept with its bytes, so that its id can't be another's.
    if known is not None and known[0] is value:
        message.MergeFromString(known[1])
        return
    _fill(value, message)
    if len(_shared_bytes) >= _SHARED_MAX:
        _shared_bytes.clear()
    _shared_bytes[id(value)] = (value, message.SerializeToString(deterministic=True))


@cache
def _numbers(enum: EnumDescriptor) -> dict[str, int]:
    prefix = _enum_prefix(enum)
    return {v.name.removeprefix(prefix): v.number for v in enum.values}
