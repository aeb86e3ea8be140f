"""What people read of a job: the status of its resource and of its roles, and Events."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from raddle.model.errors import PermanentError, RaddleError
from raddle.operator import job_status, pods
from raddle.operator.cluster import Cluster
from raddle.operator.conditions import TRUE, Condition, event, merged, turned
from raddle.operator.reasons import EventReason, OperatorReason, camel
from raddle.v1 import incident_pb2, scheduler_pb2

#: Conditions that are bad news when they are true.
_WARNINGS = ("Degraded", "Recovering")
#: Reasons that are bad news, whatever the condition.
_BAD_REASONS = (camel(OperatorReason.DEVICE_DIFFERS), camel(OperatorReason.DEVICE_TAKEN))
_TOLD_MAX = 10_000
#: For so long an API server keeps Events if nobody sets `--event-ttl`.
_EVENTS_KEPT_S = 3600.0
log = structlog.get_logger()
Object = dict[str, Any]
Answer = scheduler_pb2.GetJobResponse


def now_text() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _age_s(time: Timestamp) -> float:
    return datetime.now(UTC).timestamp() - time.ToNanoseconds() / 1e9


async def write_status(
    cluster: Cluster, resource: Object, numbers: Mapping[str, Any], conditions: list[Condition]
) -> list[Mapping[str, Any]]:
    """Patch the status if it differs; gives the conditions that turned."""
    old = resource.get("status") or {}
    generation = resource["metadata"]["generation"]
    before = old.get("conditions") or []
    after = merged(before, conditions, generation, now_text())
    wanted = {**numbers, "observedGeneration": generation, "conditions": after}
    if any(old.get(name) != value for name, value in wanted.items()):
        await cluster.patch(resource, {"status": wanted}, part="status")
    return turned(before, after)


class Teller:
    """Writes what was seen of jobs."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        #: Names of the newest Events that were told.
        self._told: dict[str, None] = {}

    async def say(
        self,
        resource: Object,
        answer: Answer | None,
        conditions: list[Condition],
        incident: incident_pb2.Incident | None,
        roles: list[Object],
    ) -> None:
        """Write the status of the resource and of its roles, and Events for what turned."""
        numbers: Object = dict.fromkeys(_job_fields(resource))
        if answer is not None:
            numbers |= job_status.status(answer, incident)
        written = await write_status(self._cluster, resource, numbers, conditions)
        for condition in written:
            is_bad = condition["type"] in _WARNINGS or condition["reason"] in _BAD_REASONS
            warning = is_bad and condition["status"] == TRUE
            name = condition["type"].upper()
            reason = EventReason(name if condition["status"] == TRUE else f"NOT_{name}")
            await self._tell(
                resource,
                reason,
                f"{condition['reason']}: {condition['message']}",
                warning=warning,
                once=f"{condition['lastTransitionTime']}/{condition['reason']}",
            )
        if incident is not None:
            await self._tell_incident(resource, incident)
        for role in roles:
            await self._say_role(role, answer, conditions)

    async def announce(self, resource: Object, incident: incident_pb2.Incident) -> None:
        """Show an incident of which the status does not speak yet."""
        if (resource.get("status") or {}).get("incident") != incident.id:
            change = {"status": {"incident": incident.id}}
            await self._cluster.patch(resource, change, part="status")
            await self._tell_incident(resource, incident)

    async def tell_refusal(self, resource: Object, error: RaddleError, roles: list[Object]) -> None:
        """The scheduler does not change a job as it is asked to; told once for each wish."""
        if isinstance(error, PermanentError):
            text = f"{error.reason}: {error.message}"
            wish = [item["metadata"]["generation"] for item in (resource, *roles)]
            once = "/".join(str(generation) for generation in wish)
            await self._tell(resource, EventReason.CHANGE_REFUSED, text, warning=True, once=once)

    async def _say_role(
        self, role: Object, answer: Answer | None, conditions: list[Condition]
    ) -> None:
        spec = role["spec"]
        placed, ready = (
            job_status.role_status(answer, spec["role"], spec["kind"]) if answer else (0, 0)
        )
        numbers = {
            "replicas": placed,
            "readyReplicas": ready,
            "selector": pods.selector(spec, answer),
        }
        said = job_status.role_conditions(placed, ready, conditions)
        await write_status(self._cluster, role, numbers, said)

    async def _tell_incident(self, resource: Object, incident: incident_pb2.Incident) -> None:
        """Its beginning and its end, even if it was over before anybody looked.

        One that has been over for longer than the API server keeps Events has had its own.
        """
        if job_status.is_closed(incident) and _age_s(incident.end_time) > _EVENTS_KEPT_S:
            return
        where = f"{incident.id} on {incident.subject_kind} {incident.subject}"
        text = f"{where}: {incident.why.message}"
        await self._tell(
            resource, EventReason.INCIDENT_OPENED, text, warning=True, once=incident.id
        )
        if job_status.is_closed(incident):
            await self._tell(
                resource, EventReason.INCIDENT_CLOSED, text, warning=False, once=incident.id
            )

    async def _tell(
        self, resource: Object, reason: EventReason, message: str, *, warning: bool, once: str
    ) -> None:
        """One Event; the same one again is one that the server has."""
        item = event(
            resource, reason=reason, message=message, warning=warning, now=now_text(), once=once
        )
        name = item["metadata"]["name"]
        if name in self._told:
            return
        try:
            await self._cluster.create(item)
        except RaddleError as error:
            # An Event is a courtesy: a namespace that goes takes none.
            log.info("an Event was not taken", why=str(error))
            return
        self._told[name] = None
        if warning:
            about = resource["metadata"]
            log.warning(message, namespace=about["namespace"], name=about["name"], reason=reason)
        if len(self._told) > _TOLD_MAX:
            del self._told[next(iter(self._told))]


def _job_fields(resource: Mapping[str, Any]) -> list[str]:
    """Fields of the status that speak of a job, to be emptied when there is none."""
    kept = ("conditions", "observedGeneration")
    return [name for name in resource.get("status") or {} if name not in kept]
