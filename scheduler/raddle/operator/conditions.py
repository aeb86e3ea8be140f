"""Conditions in Kubernetes' standard form, and the Events that their changes are worth. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raddle.model.reasons import Code
from raddle.operator.names import MANAGER
from raddle.operator.reasons import EventReason, camel

TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"
_MESSAGE_CHARACTERS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Condition:
    """What holds of a resource, and why."""

    type: str
    status: str
    reason: Code
    message: str


def merged(
    old: Iterable[Mapping[str, Any]], new: Iterable[Condition], generation: int, now: str
) -> list[dict[str, Any]]:
    """The list for a status; a condition keeps its time while its status stays."""
    known = {condition["type"]: condition for condition in old}
    found = []
    for condition in new:
        before = known.get(condition.type, {})
        same = before.get("status") == condition.status
        found.append(
            {
                "type": condition.type,
                "status": condition.status,
                "observedGeneration": generation,
                "lastTransitionTime": before["lastTransitionTime"] if same else now,
                "reason": camel(condition.reason),
                "message": condition.message[:_MESSAGE_CHARACTERS_MAX],
            }
        )
    return found


def turned(
    old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Conditions that are worth an Event: they became another thing, or true for another reason."""
    known = {c["type"]: (c["status"], c["reason"]) for c in old}
    found = []
    for condition in new:
        status, reason = known.get(condition["type"], (FALSE, ""))
        if condition["status"] != status or (status == TRUE and condition["reason"] != reason):
            found.append(condition)
    return found


def event(
    about: Mapping[str, Any],
    *,
    reason: EventReason,
    message: str,
    warning: bool,
    now: str,
    once: str,
) -> dict[str, Any]:
    """An Event about a resource; the same `once` gives the same name, so that it is told once."""
    metadata = about["metadata"]
    digest = hashlib.sha256(f"{metadata['uid']}/{reason}/{once}".encode()).hexdigest()[:16]
    namespace = metadata.get("namespace", "default")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name'][:200]}.{digest}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": metadata["name"],
            "namespace": metadata.get("namespace", ""),
            "uid": metadata["uid"],
        },
        "reason": camel(reason),
        "message": message[:_MESSAGE_CHARACTERS_MAX],
        "type": "Warning" if warning else "Normal",
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "reportingInstance": MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
