"""Messages and dataclasses tell the same, and broken records are refused, not guessed at."""

from __future__ import annotations

import dataclasses
import typing
from enum import StrEnum
from typing import Any

import pytest

from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import AgentAcks, AgentHealth, AgentRegistration
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


FOREIGN: dict[str, Any] = {
    keys.acks("sn0/n01", "j-1"): AgentAcks(node="sn0/n05", job_uid="j-1"),
    keys.acks("sn0/n01", "j-2"): AgentAcks(node="sn0/n01", job_uid="j-1"),
    keys.acks("sn0/n01", "j-3"): AgentAcks(),
    keys.health("sn0/n01"): AgentHealth(node="sn0/n05"),
    keys.registration("sn0/n01"): AgentRegistration(node="sn0/n05"),
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_record_that_speaks_of_another_is_refused(key: str) -> None:
    """Below its own node an agent says nothing of another node or job: the error names both."""
    data = wire.encode(key, FOREIGN[key])
    with pytest.raises(PermanentError) as caught:
        wire.decode(key, data)
    assert caught.value.reason is Reason.CORRUPT_RECORD
    assert key in caught.value.message
    assert FOREIGN[key].node in caught.value.message


def test_what_an_agent_says_of_itself_is_read() -> None:
    """A record whose body names its own key."""
    for value, key in (
        (AgentAcks(node="sn0/n01", job_uid="j-1"), keys.acks("sn0/n01", "j-1")),
        (AgentHealth(node="sn0/n01"), keys.health("sn0/n01")),
        (AgentRegistration(node="sn0/n01"), keys.registration("sn0/n01")),
    ):
        assert wire.decode(key, wire.encode(key, value)) == value
