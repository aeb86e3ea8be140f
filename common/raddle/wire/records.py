"""Stored records: which message and which dataclass a key's value is.

In goes a key with bytes or a value, out comes the other. A record that cannot be read raises
CORRUPT_RECORD (the reader sets it aside and goes on); one that a newer release wrote raises
NEWER_SCHEMA (a replica that sees it must not lead, since it would drop fields).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from raddle.model import health, incident, job, keys, routes
from raddle.model.errors import PermanentError, Reason
from raddle.model.topology import SuperNode
from raddle.v1 import health_pb2, incident_pb2, job_pb2, router_pb2, topology_pb2
from raddle.wire.codec import CodecError, from_message, share, to_message

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class RecordType:
    """A stored message and the value it becomes."""

    value: type[Any]
    message: type[Message]


_BY_PREFIX: tuple[tuple[str, RecordType], ...] = (
    (keys.TOPOLOGY, RecordType(SuperNode, topology_pb2.SuperNode)),
    (keys.JOBS, RecordType(job.Job, job_pb2.Job)),
    (keys.NAMES, RecordType(job.NameRecord, job_pb2.NameRecord)),
    (keys.PLACEMENTS, RecordType(job.Placement, job_pb2.Placement)),
    (keys.EXPERT_MAPS, RecordType(job.JobExpertMaps, job_pb2.JobExpertMaps)),
    (keys.ROUTES, RecordType(routes.Routes, router_pb2.Routes)),
    (keys.ASSIGNMENTS, RecordType(job.Assignment, job_pb2.Assignment)),
    (keys.INCIDENTS, RecordType(incident.Incident, incident_pb2.Incident)),
    (keys.HOLDS, RecordType(health.Hold, health_pb2.Hold)),
    (keys.MAINTENANCE, RecordType(incident.Maintenance, incident_pb2.Maintenance)),
    (keys.FAULTS, RecordType(health.FaultLedger, health_pb2.FaultLedger)),
    (keys.INJECTIONS, RecordType(health.Injections, health_pb2.Injections)),
    (keys.AUDIT, RecordType(incident.Event, incident_pb2.Event)),
)
_LEADER = RecordType(incident.LeaderRecord, incident_pb2.LeaderRecord)
_REGISTRATION = RecordType(health.AgentRegistration, topology_pb2.AgentRegistration)
_HEALTH = RecordType(health.AgentHealth, health_pb2.AgentHealth)
_ACKS = RecordType(health.AgentAcks, health_pb2.AgentAcks)


# A job's record is written at each of its steps, its spec never changes: nor does its model.
share(job.JobSpec, job.ModelSpec)


def record_type(key: str) -> RecordType | None:
    """The type of a key's value; None for a key that holds no record (an operation id)."""
    if key == keys.LEADER:
        return _LEADER
    if key.startswith(keys.AGENTS):
        if key.endswith("/registration"):
            return _REGISTRATION
        if key.endswith("/health"):
            return _HEALTH
        return _ACKS if "/acks/" in key else None
    for prefix, found in _BY_PREFIX:
        if key.startswith(prefix):
            return found
    return None


def encode(key: str, value: Any) -> bytes:
    """The bytes to store under `key`; the value's class must be the key's."""
    found = record_type(key)
    assert found is not None, key
    assert type(value) is found.value, (key, type(value))
    message = to_message(value, found.message)
    message.schema_version = SCHEMA_VERSION
    return bytes(message.SerializeToString(deterministic=True))


def decode(key: str, data: bytes) -> Any:
    """The value stored under `key`.

    Raises:
        PermanentError: CORRUPT_RECORD or NEWER_SCHEMA, with the key in the details.
    """
    value = _decode(key, data)
    meant = _agent_key(value)
    if meant not in ("", key):
        raise PermanentError(
            Reason.CORRUPT_RECORD, f"{key} speaks of {meant}; set it aside", key=key
        )
    return value


def _agent_key(value: Any) -> str:
    """Where an agent's record belongs by what it says; empty for records of others.

    etcd lets each agent write below its own node alone, so the key tells who speaks: what is said
    there of another node, or of another job, is nobody's word.
    """
    match value:
        case health.AgentAcks():
            return keys.acks(value.node, value.job_uid)
        case health.AgentRegistration():
            return keys.registration(value.node)
        case health.AgentHealth():
            return keys.health(value.node)
        case _:
            return ""


def _decode(key: str, data: bytes) -> Any:
    """What the bytes say, whoever they speak of; raises as `decode` does."""
    found = record_type(key)
    if found is None:
        raise PermanentError(
            Reason.CORRUPT_RECORD, f"{key} is no key of this release; set it aside", key=key
        )
    try:
        message = found.message.FromString(data)
        version = message.schema_version  # type: ignore[attr-defined]
        if version > SCHEMA_VERSION:
            raise PermanentError(
                Reason.NEWER_SCHEMA,
                f"{key} has schema {version}, newer than {SCHEMA_VERSION}: upgrade this replica",
                key=key,
            )
        if version < 1:
            raise PermanentError(
                Reason.CORRUPT_RECORD, f"{key} has no schema version; set it aside", key=key
            )
        return from_message(message, found.value)
    except (DecodeError, CodecError, ValueError) as error:
        raise PermanentError(
            Reason.CORRUPT_RECORD, f"{key} cannot be read ({error}); set it aside", key=key
        ) from error
