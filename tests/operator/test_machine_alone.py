"""The machine and its resources, where the API server and the scheduler are dictionaries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from raddle.model.errors import Reason, TemporaryError
from raddle.operator.cluster import Cluster
from raddle.operator.machine import Machine, MachineOptions
from raddle.operator.machine_resources import MachineResources, applied
from raddle.operator.machine_view import CONDITION
from raddle.operator.names import FINALIZER
from raddle.operator.reasons import OperatorReason
from raddle.operator.scheduler_link import IDENTITY, Picture, SchedulerLink
from raddle.operator.served import Served
from raddle.v1 import incident_pb2, scheduler_pb2
from tests.operator.resources import SITE

Object = dict[str, Any]
SNAPSHOT, SYNCED = scheduler_pb2.WATCH_KIND_SNAPSHOT, scheduler_pb2.WATCH_KIND_SYNCED
LONG_AGO = "2026-01-01T00:00:00Z"


class ApiServer:
    """Objects by kind and name, and the names of those that were written."""

    def __init__(self, *items: Object) -> None:
        self.items = {(item["kind"], item["metadata"]["name"]): item for item in items}
        self.written: list[str] = []

    async def get(self, kind: str, _namespace: str, name: str) -> Object | None:
        return self.items.get((kind, name))

    async def find(self, kind: str) -> list[Object]:
        return [item for (known, _), item in self.items.items() if known == kind]

    async def create(self, item: Object) -> Object:
        self.written.append(item["metadata"]["name"])
        return self.items.setdefault((item["kind"], item["metadata"]["name"]), item)

    async def patch(self, item: Object, change: Object, *, part: str = "") -> Object | None:
        found = self.items.get((item["kind"], item["metadata"]["name"]))
        if found is None:
            return None
        self.written.append(item["metadata"]["name"])
        for name, values in change.items():
            merged = (found.get(name) or {}) | values
            found[name] = {key: value for key, value in merged.items() if value is not None}
        return found

    async def patch_node_condition(self, node: str, condition: Mapping[str, str]) -> None:
        self.written.append(node)
        status = self.items["Node", node]["status"]
        conditions = {c["type"]: c for c in status["conditions"]}
        conditions[CONDITION] = {**conditions.get(CONDITION, {}), **condition}
        status["conditions"] = list(conditions.values())


class Scheduler:
    """Nodes and drains as the watches tell them, and the calls that came."""

    def __init__(self, **states: str) -> None:
        self.nodes, self.maintenances = Picture("node", "node"), Picture("maintenance", "id")
        self.calls: list[tuple[str, Any]] = []
        for name, state in states.items():
            self.tell(f"sn0/{name}", state)

    def tell(self, node: str, state: str) -> None:
        told = scheduler_pb2.WatchNodesResponse(kind=SNAPSHOT)
        told.node.node, told.node.state = node, state
        told.dies.add(die=f"{node}/npu0/die0")
        self.nodes.take(told)

    def tell_drain(self, name: str, subject: str, created_by: str = IDENTITY) -> None:
        told = scheduler_pb2.WatchMaintenancesResponse(kind=SNAPSHOT)
        told.maintenance.id, told.maintenance.subject = name, subject
        told.maintenance.created_by = created_by
        told.maintenance.state = incident_pb2.MAINTENANCE_STATE_DRAINING
        self.maintenances.take(told)

    def all_told(self) -> None:
        self.nodes.take(scheduler_pb2.WatchNodesResponse(kind=SYNCED))
        self.maintenances.take(scheduler_pb2.WatchMaintenancesResponse(kind=SYNCED))

    async def call(self, method: str, request: Any) -> Any:
        self.calls.append((method, request))
        found = scheduler_pb2.GetMaintenanceResponse()
        if method == "GetMaintenance":
            found.maintenance.CopyFrom(self.maintenances.values[request.id].maintenance)
        return found


def kubernetes_node(name: str, **labels: str) -> Object:
    status = {"conditions": [{"type": "Ready", "status": "True"}]}
    metadata = {"name": name, "labels": labels}
    return {"kind": "Node", "metadata": metadata, "spec": {}, "status": status}


def share_map(**shares: str) -> Object:
    return {"kind": "ConfigMap", "metadata": {"name": "raddle-nodes"}, "data": shares}


def machine(api: ApiServer, scheduler: Scheduler, *, simulated: bool = True) -> Machine:
    return Machine(
        cast("Cluster", api),
        cast("SchedulerLink", scheduler),
        Served(cast("Cluster", api)),
        replace(SITE, namespace="default", release="raddle"),
        MachineOptions(
            simulated=simulated,
            node_selector={"pool": "x"},
            tolerated_taints=(),
            foreign_pods=False,
        ),
    )


def resources(api: ApiServer, scheduler: Scheduler, *served: str) -> MachineResources:
    cluster = cast("Cluster", api)
    return MachineResources(cluster, cast("SchedulerLink", scheduler), Served(cluster, served))


def maintenance(name: str, subject: str, **status: str) -> Object:
    metadata = {"name": name, "uid": name, "generation": 1, "resourceVersion": "1"}
    metadata |= {"finalizers": [FINALIZER]}
    spec = {"subject": subject}
    return {"kind": "Maintenance", "metadata": metadata, "spec": spec, "status": status}


async def test_nobody_waits_for_a_scheduler_that_is_away() -> None:
    """Work that needs its whole picture is refused for now, and others can be worked on."""
    scheduler, api = Scheduler(n00="READY"), ApiServer(maintenance("fans", "sn0/n00"))
    async with asyncio.timeout(10.0):
        with pytest.raises(TemporaryError):
            await machine(api, scheduler).bring()
        with pytest.raises(TemporaryError):
            await resources(api, scheduler).bring_maintenance("fans")
    assert api.items["Maintenance", "fans"]["status"]["conditions"][0]["status"] == "Unknown"


async def test_what_was_said_of_a_drain_stays_while_the_scheduler_is_away() -> None:
    """An operator that begins knows nothing yet, and that is no news about the drain."""
    api = ApiServer(maintenance("fans", "sn0/n00", id="m-1", state="DRAINED"))
    with pytest.raises(TemporaryError):
        await resources(api, Scheduler()).bring_maintenance("fans")
    assert api.written == []


async def test_a_kubernetes_node_that_is_no_part_any_more_is_not_gone() -> None:
    """Ranks serve there though its label went; only a Node that is not there is a witness."""
    scheduler = Scheduler(n00="READY", n01="UNKNOWN")
    scheduler.all_told()
    nodes = kubernetes_node("worker-1", pool="x"), kubernetes_node("worker-2")
    shares = share_map(**{"worker-1": "sn0/n00", "worker-2": "sn0/n01"})
    api = ApiServer(*nodes, shares)
    found = machine(api, scheduler)
    await found.bring()
    assert scheduler.calls == []
    del api.items["Node", "worker-2"]
    await found.bring()
    assert [(method, request.node) for method, request in scheduler.calls] == [
        ("DeclareNodeLost", "sn0/n01")
    ]


async def test_who_plays_a_node_is_known_though_the_scheduler_refuses_what_follows() -> None:
    """A call fails after the shares changed: jobs hear of the change all the same."""

    class Leaderless(Scheduler):
        async def call(self, method: str, request: Any) -> Any:
            raise TemporaryError(Reason.NO_LEADER, f"no leader for {method} of {request}")

    scheduler = Leaderless(n00="READY", n01="UNKNOWN")
    scheduler.all_told()
    shares = share_map(**{"worker-1": "sn0/n00", "worker-2": "sn0/n01"})
    found = machine(ApiServer(kubernetes_node("worker-1", pool="x"), shares), scheduler)
    assert found.carriers is None
    with pytest.raises(TemporaryError):
        await found.bring()
    assert found.carriers is not None
    assert found.carriers["sn0/n00"] == "worker-1"


async def test_what_tools_read_is_written_again_when_it_went() -> None:
    """What counts is what the API server has, not what was once written there."""
    scheduler = Scheduler(n00="READY", n01="READY")
    scheduler.all_told()
    shares = share_map(**{"worker-1": "sn0/n00,sn0/n01"})
    api = ApiServer(kubernetes_node("worker-1", pool="x"), shares)
    found = machine(api, scheduler)
    await found.bring()
    await found.bring()
    assert api.written == ["worker-1", "raddle-dies-sn0"]
    del api.items["Node", "worker-1"]["status"]["conditions"][1]
    api.items["ConfigMap", "raddle-dies-sn0"]["data"] = {"sn0.n00": "{}", "sn0.n99": "{}"}
    api.written.clear()
    await found.bring()
    assert api.written == ["worker-1", "raddle-dies-sn0"]
    assert api.items["Node", "worker-1"]["status"]["conditions"][1]["reason"] == "AllDiesHealthy"
    dies = api.items["ConfigMap", "raddle-dies-sn0"]["data"]
    assert set(dies) == {"sn0.n00", "sn0.n01"}
    assert json.loads(dies["sn0.n00"])["state"] == "READY"


async def test_another_operator_shows_the_same_and_keeps_its_time() -> None:
    """It writes nothing that is there; a new reason of the same status is no transition."""
    scheduler = Scheduler(n00="READY")
    scheduler.all_told()
    shares = share_map(**{"worker-1": "sn0/n00"})
    api = ApiServer(kubernetes_node("worker-1", pool="x"), shares)
    await machine(api, scheduler).bring()
    (_, condition) = api.items["Node", "worker-1"]["status"]["conditions"]
    condition["lastTransitionTime"] = LONG_AGO
    api.written.clear()
    await machine(api, scheduler).bring()
    assert api.written == []
    condition["reason"], condition["message"] = "DiesHeld", "1 of 1 dies are held"
    second = machine(api, scheduler)
    await second.bring()
    (_, condition) = api.items["Node", "worker-1"]["status"]["conditions"]
    assert (condition["reason"], condition["lastTransitionTime"]) == ("AllDiesHealthy", LONG_AGO)
    assert not second.is_changed(api.items["Node", "worker-1"])


async def test_of_kubernetes_nodes_with_one_label_one_plays_the_node() -> None:
    """Who did so goes on, whatever the others' names; the SuperNode says which they are."""
    scheduler = Scheduler(n00="READY", n01="READY")
    scheduler.all_told()
    label = "raddle.dev/node"
    labelled = [("worker-0", "sn0.n01"), ("worker-1", "sn0.n00"), ("worker-2", "sn0.n01")]
    nodes = [kubernetes_node(name, **{label: node}) for name, node in labelled]
    api = ApiServer(*nodes, share_map(**{"worker-2": "sn0/n01"}))
    found = machine(api, scheduler, simulated=False)
    await found.bring()
    shares = {"worker-0": "", "worker-1": "sn0/n00", "worker-2": "sn0/n01"}
    assert api.items["ConfigMap", "raddle-nodes"]["data"] == shares
    assert found.named_twice == {"sn0/n01": ("worker-0", "worker-2")}
    condition = applied("sn0", found.named_twice)
    assert (condition.status, condition.reason) == ("True", OperatorReason.NODE_LABELLED_TWICE)
    assert "worker-0, worker-2 are all labelled as sn0/n01" in condition.message
    assert applied("sn1", found.named_twice).reason is OperatorReason.APPLIED


async def test_an_agent_that_shall_serve_nothing_is_told_so() -> None:
    """It would wait for its share else, and an installation or upgrade for it."""
    scheduler = Scheduler(n00="ABSENT")
    scheduler.all_told()
    api = ApiServer(kubernetes_node("worker-1", pool="x"), kubernetes_node("worker-2", pool="x"))
    await machine(api, scheduler).bring()
    shares = {"worker-1": "sn0/n00", "worker-2": ""}
    assert api.items["ConfigMap", "raddle-nodes"]["data"] == shares


async def test_of_a_real_node_that_went_the_witness_is_heard_though_it_is_asked_late() -> None:
    """Its share stays until the scheduler knows that what ran there is lost."""
    scheduler = Scheduler(n00="READY")
    scheduler.all_told()
    api = ApiServer(share_map(**{"worker-1": "sn0/n00"}))
    found = machine(api, scheduler, simulated=False)
    await found.bring()
    assert scheduler.calls == []
    scheduler.tell("sn0/n00", "UNKNOWN")
    await found.bring()
    assert [method for method, _ in scheduler.calls] == ["DeclareNodeLost"]
    scheduler.tell("sn0/n00", "LOST")
    await found.bring()
    assert api.items["ConfigMap", "raddle-nodes"]["data"] == {}


async def test_a_drain_that_was_never_written_down_ends_with_its_resource() -> None:
    """It is found by its subject; those of others and of other resources stay."""
    gone = maintenance("fans", "sn0/n00/npu0")
    gone["metadata"]["deletionTimestamp"] = LONG_AGO
    other = maintenance("other", "sn0/n00/npu0", id="m-2")
    api, scheduler = ApiServer(gone, other), Scheduler()
    scheduler.tell_drain("m-1", "sn0/n00/npu0", created_by="somebody")
    scheduler.tell_drain("m-2", "sn0/n00/npu0")
    scheduler.tell_drain("m-3", "sn0/n00/npu1")
    with pytest.raises(TemporaryError):
        await resources(api, scheduler).bring_maintenance("fans")
    scheduler.all_told()
    scheduler.tell_drain("m-4", "sn0/n00/npu0")
    await resources(api, scheduler).bring_maintenance("fans")
    ended = [request.id for method, request in scheduler.calls if method == "CancelMaintenance"]
    assert ended == ["m-4"]
    assert gone["metadata"]["finalizers"] == []


async def test_a_drain_of_another_release_is_not_taken_for_our_own() -> None:
    """Each release's scheduler numbers its drains from one, so that ids are the same."""
    gone = maintenance("fans", "sn0/n00")
    gone["metadata"]["deletionTimestamp"] = LONG_AGO
    scheduler = Scheduler()
    scheduler.tell_drain("m-1", "sn0/n00")
    scheduler.all_told()
    api = ApiServer(gone, maintenance("theirs", "sn1/n00", id="m-1"))
    await resources(api, scheduler, "sn0").bring_maintenance("fans")
    ended = [request.id for method, request in scheduler.calls if method == "CancelMaintenance"]
    assert ended == ["m-1"]
    assert gone["metadata"]["finalizers"] == []


async def test_another_holder_of_a_die_is_news_for_jobs() -> None:
    """A rank's Pod may have got another device than it is meant to use; on a real machine alone."""
    scheduler = Scheduler(n00="READY")
    api = ApiServer(kubernetes_node("worker-1", **{"raddle.dev/node": "sn0.n00", "pool": "x"}))
    scheduler.all_told()
    annotations = {"raddle.dev/die": "sn0/n00/npu0/die1"}
    pod = {"metadata": {"name": "rank", "namespace": "a", "annotations": annotations}}
    real, played = machine(api, scheduler, simulated=False), machine(api, scheduler)
    await real.bring()
    assert real.holders == {}
    told = scheduler.nodes.values["sn0/n00"]
    told.dies.add(die="sn0/n00/npu0/die1")
    told.dies[0].holder = "a/rank"
    await real.bring()
    assert real.holders == {"sn0/n00/npu0/die0": ("a/rank", False)}
    (wrong,) = real.wrong_devices([pod])
    assert (wrong.placed, wrong.given) == ("sn0/n00/npu0/die1", ("sn0/n00/npu0/die0",))
    assert played.wrong_devices([pod]) == []
