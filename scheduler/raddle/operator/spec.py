"""What an InferenceJob asks for, as the scheduler's `JobSpec`, and how to get there. Pure.

In go the resource as the API server stores it and the sizes of its roles; out come a message, and
the calls that turn the job that the scheduler has into the one that is wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import json_format

from raddle import models
from raddle.model.errors import PermanentError, Reason
from raddle.model.job import JobSpec, RoleSpec
from raddle.model.kinds import RoleKind
from raddle.v1 import job_pb2
from raddle.wire import parse
from raddle.wire.codec import from_message

#: What the resource has and the message has not.
_OWN_FIELDS = ("suspend",)
_OWN_FIELDS_OF_ROLE = ("template",)
_MUTABLE = ("priority", "recovery")


def is_suspended(resource: Mapping[str, Any]) -> bool:
    return bool(resource["spec"].get("suspend"))


def size_field(kind: str) -> str:
    """The field of a role that `replicas` of its InferenceRole is.

    A prefill or decode role grows by whole instances: another number of ranks would be another
    expert-parallel group, with all its weights laid out anew. A cache role grows by ranks, each
    the memory of one more host.
    """
    return "ranks" if kind == RoleKind.CACHE else "instances"


def replicas(role: Mapping[str, Any]) -> int:
    """The size that a role of the resource has in terms of its InferenceRole."""
    return int(role.get(size_field(role["kind"]), 1))


def job_message(resource: Mapping[str, Any], sizes: Mapping[str, int]) -> job_pb2.JobSpec:
    """The message of a resource; `sizes` (role -> replicas) go before the resource's own.

    Raises:
        PermanentError: UNKNOWN_FIELD or INVALID_ARGUMENT naming what is wrong.
    """
    spec = copy.deepcopy(dict(resource["spec"]))
    for name in _OWN_FIELDS:
        spec.pop(name, None)
    for role in spec.get("roles", ()):
        for name in _OWN_FIELDS_OF_ROLE:
            role.pop(name, None)
        if role.get("name") in sizes:
            role[size_field(role["kind"])] = sizes[role["name"]]
    config = spec.get("model", {}).get("config")
    if config in models.names():
        spec["model"]["config"] = models.config_text(config)
    message = job_pb2.JobSpec()
    try:
        json_format.ParseDict(spec, message)
    except (json_format.ParseError, TypeError) as error:
        text = " ".join(str(error).split())[:400]
        raise PermanentError(Reason.INVALID_ARGUMENT, f"spec: {text}") from error
    message.namespace = resource["metadata"]["namespace"]
    message.name = resource["metadata"]["name"]
    return message


@dataclass(frozen=True, slots=True)
class Update:
    """Change these paths of the spec."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """Change the size of a role; exactly one number is above 0."""

    role: str
    instances: int = 0
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class Replace:
    """What differs can't be changed: the job ends, and another one takes its place."""

    message: str


Change = Update | Scale | Replace


def changes(wanted: job_pb2.JobSpec, actual: job_pb2.JobSpec) -> list[Change]:
    """The calls that make the job what is wanted, in order; empty if it is that."""
    want, have = parse.job_spec(wanted), from_message(actual, JobSpec)
    want = replace(want, queue=have.queue)
    fixed = _difference(want, have)
    if fixed:
        return [Replace(f"{fixed} cannot change while a job runs")]
    found: list[Change] = []
    paths = tuple(name for name in _MUTABLE if getattr(want, name) != getattr(have, name))
    if paths:
        found.append(Update(paths))
    old = {role.name: role for role in have.roles}
    for role in want.roles:
        if role.instances != old[role.name].instances:
            found.append(Scale(role.name, instances=role.instances))
        if role.ranks != old[role.name].ranks:
            found.append(Scale(role.name, ranks=role.ranks))
    return found


def _difference(want: JobSpec, have: JobSpec) -> str:
    """The first part that differs and can't be changed; empty if none does."""
    if want.model != have.model:
        return "model"
    roles = [{role.name: _fixed(role) for role in spec.roles} for spec in (want, have)]
    return "" if roles[0] == roles[1] else "roles"


def _fixed(role: RoleSpec) -> RoleSpec:
    return replace(role, instances=0, ranks=0)
