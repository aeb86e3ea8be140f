"""SuperNodes and Maintenances: resources of the whole cluster, each one call to the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raddle.machines import machine_message
from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.model.kinds import NodeState
from raddle.operator.cluster import Cluster
from raddle.operator.conditions import FALSE, TRUE, UNKNOWN, Condition
from raddle.operator.finalizers import hold, is_held, let_go
from raddle.operator.reasons import OperatorReason, named
from raddle.operator.scheduler_link import IDENTITY, SchedulerLink
from raddle.operator.served import Served
from raddle.operator.telling import write_status
from raddle.v1 import incident_pb2, scheduler_pb2, topology_pb2
from raddle.wire.parse import set_fields

Object = dict[str, Any]
_OVER = (incident_pb2.MAINTENANCE_STATE_CANCELLED, incident_pb2.MAINTENANCE_STATE_EXPIRED)


def supernode_message(resource: Mapping[str, Any]) -> topology_pb2.SuperNode:
    """The description of a resource: its own fields over those of the machine that it names.

    Raises:
        PermanentError: UNKNOWN_FIELD or INVALID_ARGUMENT naming what is wrong.
    """
    message = machine_message(resource["spec"], "spec")
    message.name = resource["metadata"]["name"]
    return message


def maintenance_request(resource: Mapping[str, Any]) -> scheduler_pb2.CreateMaintenanceRequest:
    """The drain of a resource.

    Raises:
        PermanentError: UNKNOWN_FIELD or INVALID_ARGUMENT naming what is wrong.
    """
    request = scheduler_pb2.CreateMaintenanceRequest()
    set_fields(resource["spec"], request, "spec")
    return request


def drained(record: incident_pb2.Maintenance) -> Condition:
    """The condition of a drain."""
    done = record.state == incident_pb2.MAINTENANCE_STATE_DRAINED
    reason, message = named(record.why.reason, record.why.message or "no more is known")
    return Condition("Drained", TRUE if done else FALSE, reason, message)


def refused(name: str, error: RaddleError) -> Condition:
    status = UNKNOWN if isinstance(error, TemporaryError) else FALSE
    return Condition(name, status, error.reason, error.message)


def applied(name: str, named_twice: Mapping[str, Sequence[str]]) -> Condition:
    """The condition of a supernode that the scheduler knows, with what is wrong about its nodes."""
    message = "the scheduler knows this description"
    wrong = [
        f"Kubernetes nodes {', '.join(hosts)} are all labelled as {node}, and one of them counts"
        for node, hosts in sorted(named_twice.items())
        if node.startswith(f"{name}/")
    ]
    if not wrong:
        return Condition("Applied", TRUE, OperatorReason.APPLIED, message)
    return Condition(
        "Applied", TRUE, OperatorReason.NODE_LABELLED_TWICE, "; ".join([message, *wrong])
    )


def supernode_numbers(name: str, nodes: Sequence[scheduler_pb2.NodeStatus]) -> dict[str, int]:
    """What the status of a supernode counts, over its nodes."""
    ours = [node for node in nodes if node.node.startswith(f"{name}/")]
    return {
        "nodes": len(ours),
        "nodesReady": sum(node.state == NodeState.READY for node in ours),
        "dies": sum(node.dies for node in ours),
        "diesFree": sum(node.dies_free for node in ours),
        "diesHeld": sum(node.dies_held for node in ours),
        "diesFaulty": sum(node.dies_faulty for node in ours),
    }


class MachineResources:
    """Both kinds, brought to where they belong."""

    def __init__(
        self,
        cluster: Cluster,
        link: SchedulerLink,
        served: Served,
        named_twice: Callable[[], Mapping[str, Sequence[str]]] = dict,
    ) -> None:
        """`named_twice`: nodes of a machine that the labels of several Kubernetes nodes name."""
        self._cluster = cluster
        self._link = link
        self._served = served
        self._named_twice = named_twice

    async def bring_supernode(self, name: str) -> bool:
        """Have the scheduler know the description; False if there is no such resource."""
        resource = await self._cluster.get("SuperNode", "", name)
        if resource is None or resource["metadata"].get("deletionTimestamp"):
            return False
        try:
            request = scheduler_pb2.ApplySuperNodeRequest(supernode=supernode_message(resource))
            await self._link.call("ApplySuperNode", request)
        except RaddleError as error:
            await write_status(self._cluster, resource, {}, [refused("Applied", error)])
            raise
        nodes = [told.node for told in self._link.nodes.values.values()]
        said = [applied(name, self._named_twice())]
        await write_status(self._cluster, resource, supernode_numbers(name, nodes), said)
        return True

    async def bring_maintenance(self, name: str) -> bool:
        """Begin the drain, follow it, end it with the resource; False if there is none."""
        resource = await self._cluster.get("Maintenance", "", name)
        if resource is None:
            return False
        if resource["metadata"].get("deletionTimestamp"):
            if is_held(resource):
                await self._cancel(_id(resource) or await self._unwritten(resource))
                await let_go(self._cluster, resource)
            return True
        if not await hold(self._cluster, resource):
            return False
        try:
            record = await self._record(resource)
        except RaddleError as error:
            if isinstance(error, PermanentError) or not _id(resource):
                # A drain goes on while the scheduler is away; what was said of it stays.
                await write_status(self._cluster, resource, {}, [refused("Drained", error)])
            raise
        await write_status(self._cluster, resource, _maintenance_numbers(record), [drained(record)])
        return True

    async def _record(self, resource: Object) -> incident_pb2.Maintenance:
        """The scheduler's record of this resource, made if there is none."""
        self._link.maintenances.require_whole()
        known = _id(resource)
        told = self._link.maintenances.values.get(known)
        if told is not None:
            found: incident_pb2.Maintenance = told.maintenance
            return found
        if known:
            return await self._get(known)
        answer = await self._link.call("CreateMaintenance", maintenance_request(resource))
        record: incident_pb2.Maintenance = answer.maintenance
        await self._refuse_foreign(resource, record)
        # Written at once: it is by this that the drain ends with the resource.
        await self._cluster.patch(resource, {"status": {"id": record.id}}, part="status")
        return record

    async def _get(self, maintenance_id: str) -> incident_pb2.Maintenance:
        request = scheduler_pb2.GetMaintenanceRequest(id=maintenance_id)
        record: incident_pb2.Maintenance = (
            await self._link.call("GetMaintenance", request)
        ).maintenance
        return record

    async def _refuse_foreign(self, resource: Object, record: incident_pb2.Maintenance) -> None:
        """The subject is drained already: by somebody else, or for another resource?"""
        if record.created_by != IDENTITY:
            raise PermanentError(
                Reason.MANAGED_BY_OTHER,
                f"{record.subject} is drained already by {record.created_by} ({record.id}).",
            )
        for other in await self._served.maintenances():
            is_other = other["metadata"]["uid"] != resource["metadata"]["uid"]
            if is_other and _id(other) == record.id:
                raise PermanentError(
                    Reason.ALREADY_EXISTS,
                    f"{record.subject} is drained already for Maintenance"
                    f" {other['metadata']['name']} ({record.id}).",
                )

    async def _unwritten(self, resource: Object) -> str:
        """The id of a drain that was begun for the resource and never written into its status."""
        self._link.maintenances.require_whole()
        of_others = {_id(other) for other in await self._served.maintenances()}
        told = (message.maintenance for message in self._link.maintenances.values.values())
        found = (
            str(record.id)
            for record in told
            if record.subject == resource["spec"]["subject"]
            and record.created_by == IDENTITY
            and record.state not in _OVER
            and record.id not in of_others
        )
        return next(found, "")

    async def _cancel(self, maintenance_id: str) -> None:
        if not maintenance_id:
            return
        try:
            record = await self._get(maintenance_id)
            if record.state not in _OVER:
                request = scheduler_pb2.CancelMaintenanceRequest(id=maintenance_id)
                await self._link.call("CancelMaintenance", request)
        except PermanentError as error:
            if error.reason is not Reason.NOT_FOUND:
                raise


def _id(resource: Mapping[str, Any]) -> str:
    """Of the drain that a Maintenance stands for; empty if its status does not say."""
    return (resource.get("status") or {}).get("id") or ""


def _maintenance_numbers(record: incident_pb2.Maintenance) -> Object:
    name = incident_pb2.MaintenanceState.Name(record.state).removeprefix("MAINTENANCE_STATE_")
    return {
        "id": record.id,
        "state": name,
        "ranksTotal": record.ranks_total,
        "ranksMoved": record.ranks_moved,
        "deadline": record.deadline.ToJsonString(),
    }
