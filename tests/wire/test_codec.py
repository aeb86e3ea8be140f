"""Messages and dataclasses tell the same, and broken records are refused, not guessed at."""

from __future__ import annotations

import dataclasses
import typing
from enum import StrEnum
from typing import Any

import pytest

from raddle.model.errors import PermanentError, Reason
from raddle.model.job import Job, JobState
from raddle.v1 import job_pb2
from raddle.wire import records as wire
from raddle.wire.status import code_of

KEYS = [
    "leader",
    "topology/sn0",
    "jobs/j-1",
    "names/default/x",
    "placements/j-1",
    "expertmaps/j-1/1",
    "routes/j-1",
    "assignments/sn0/n00",
    "incidents/i-1",
    "holds/sn0/n00",
    "maintenance/m-1",
    "faults/sn0/n00",
    "injections/sn0/n00",
    "audit/e-1",
    "agents/sn0/n00/registration",
    "agents/sn0/n00/health",
    "agents/sn0/n00/acks/j-1",
]


def _same_fields(value_type: Any, descriptor: Any, seen: set[str]) -> None:
    if descriptor.full_name in seen:
        return
    seen.add(descriptor.full_name)
    names = {field.name for field in dataclasses.fields(value_type)}
    assert names == {f.name for f in descriptor.fields} - {"schema_version"}, value_type
    hints = typing.get_type_hints(value_type)
    for field in descriptor.fields:
        inner = [t for t in (hints.get(field.name), *typing.get_args(hints.get(field.name))) if t]
        for part in inner:
            if field.message_type is not None and dataclasses.is_dataclass(part):
                _same_fields(part, field.message_type, seen)
            if field.enum_type is not None and isinstance(part, type) and issubclass(part, StrEnum):
                assert len(part) == len(field.enum_type.values), part


@pytest.mark.parametrize("key", KEYS)
def test_every_record_has_the_fields_of_its_message(key: str) -> None:
    """Model and proto carry the same field names and enum values, all the way down."""
    found = wire.record_type(key)
    assert found is not None
    _same_fields(found.value, found.message.DESCRIPTOR, set())


def test_a_record_survives_the_round_trip() -> None:
    """What is encoded is decoded to an equal value."""
    job = Job(uid="j-1", state=JobState.READY, epoch=3, create_time=1.5)
    assert wire.decode("jobs/j-1", wire.encode("jobs/j-1", job)) == job


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"\x0a"])
def test_a_broken_record_is_corrupt(data: bytes) -> None:
    """Bytes that are no record of this schema are CORRUPT_RECORD."""
    with pytest.raises(PermanentError) as caught:
        wire.decode("jobs/j-1", data)
    assert caught.value.reason is Reason.CORRUPT_RECORD


def test_a_newer_schema_is_told_apart() -> None:
    """A record of a newer release is NEWER_SCHEMA: nobody may drop its fields."""
    data = job_pb2.Job(schema_version=wire.SCHEMA_VERSION + 1).SerializeToString()
    with pytest.raises(PermanentError) as caught:
        wire.decode("jobs/j-1", data)
    assert caught.value.reason is Reason.NEWER_SCHEMA


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_code(reason: Reason) -> None:
    """The one table knows a gRPC code for every reason."""
    assert code_of(reason) is not None
