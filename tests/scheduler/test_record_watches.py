"""Watches of nodes, maintenances and incidents over gRPC: a snapshot, then every change."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import Reason
from raddle.model.health import AgentHealth, AgentRegistration, DieHolder, PartIdentity
from raddle.model.incident import Incident, IncidentPhase, JobPlan
from raddle.scheduler.authorization import Policy, Rule
from raddle.store.protocol import Delete, Put, Transaction
from raddle.v1 import incident_pb2, scheduler_pb2, topology_pb2
from raddle.wire import records as wire
from raddle.wire.codec import to_message
from raddle.wire.status import error_from
from tests.scheduler.conftest import Served, refusal

SNAPSHOT = scheduler_pb2.WATCH_KIND_SNAPSHOT
SYNCED = scheduler_pb2.WATCH_KIND_SYNCED
CHANGED = scheduler_pb2.WATCH_KIND_CHANGED
DELETED = scheduler_pb2.WATCH_KIND_DELETED
DRAINING = incident_pb2.MAINTENANCE_STATE_DRAINING
CANCELLED = incident_pb2.MAINTENANCE_STATE_CANCELLED


def put(served: Served, key: str, value: Any) -> int:
    return served.backend.commit(Transaction(writes=(Put(key, wire.encode(key, value)),))).revision


async def snapshot(stream: Any) -> list[Any]:
    """The messages before SYNCED."""
    found: list[Any] = []
    while (message := await stream.read()).kind != SYNCED:
        assert message.kind == SNAPSHOT
        found.append(message)
    return found


async def test_a_maintenance_is_told_from_its_beginning_to_its_end(served: Served) -> None:
    """What is there comes first; a drain that begins and one that ends are changes."""
    stub = served.stub()
    first = (
        await stub.CreateMaintenance(scheduler_pb2.CreateMaintenanceRequest(subject="sn0/n00"))
    ).maintenance
    stream = stub.WatchMaintenances(scheduler_pb2.WatchMaintenancesRequest())
    assert [message.maintenance.id for message in await snapshot(stream)] == [first.id]
    await stub.CancelMaintenance(scheduler_pb2.CancelMaintenanceRequest(id=first.id))
    message = await stream.read()
    while message.maintenance.state != CANCELLED:
        message = await stream.read()
    assert (message.kind, message.maintenance.id) == (CHANGED, first.id)
    assert message.revision == served.mirror.mod_revision(keys.maintenance(first.id))
    again = stub.WatchMaintenances(
        scheduler_pb2.WatchMaintenancesRequest(after_revision=message.revision - 1)
    )
    assert (await again.read()).maintenance.state == CANCELLED


async def test_a_revision_out_of_range_is_refused_on_every_watch(served: Served) -> None:
    """Who is ahead of the store begins with a snapshot."""
    stub = served.stub()
    for stream in (
        stub.WatchMaintenances(scheduler_pb2.WatchMaintenancesRequest(after_revision=10**9)),
        stub.WatchIncidents(scheduler_pb2.WatchIncidentsRequest(after_revision=10**9)),
    ):
        error = await refusal(stream.read())
        assert error.reason is Reason.COMPACTED


async def test_an_incident_is_told_to_those_who_may_see_its_jobs(served: Served) -> None:
    """A reader of one namespace hears of its own job's part, of no other job, and of the end."""
    mine, other = await served.submit("one", "mine"), await served.submit("two", "other")
    everywhere = served.stub().WatchIncidents(scheduler_pb2.WatchIncidentsRequest())
    of_job = served.stub().WatchIncidents(scheduler_pb2.WatchIncidentsRequest(job_uid=mine.uid))
    served.set_policy(
        Policy(
            [
                Rule(["client/admin"], ["read"]),
                Rule(["client/mine"], ["read"], ["mine"]),
            ]
        )
    )
    narrow = served.stub("client/mine").WatchIncidents(scheduler_pb2.WatchIncidentsRequest())
    for stream in (everywhere, of_job, narrow):
        assert await snapshot(stream) == []
    both = (JobPlan(job_uid=mine.uid, epoch=2), JobPlan(job_uid=other.uid, epoch=2))
    foreign = Incident(id="i-000001", phase=IncidentPhase.REPAIR, plans=both[1:])
    shared = Incident(id="i-000002", phase=IncidentPhase.REPAIR, plans=both)
    for incident in (foreign, shared):
        put(served, keys.incident(incident.id), incident)
    assert [(await everywhere.read()).incident.id for _ in range(2)] == ["i-000001", "i-000002"]
    assert (await of_job.read()).incident.id == "i-000002"
    told = await narrow.read()
    assert [plan.job_uid for plan in told.incident.plans] == [mine.uid]
    served.backend.commit(Transaction(writes=(Delete(keys.incident(shared.id)),)))
    gone = await narrow.read()
    assert (gone.kind, gone.incident.id) == (DELETED, "i-000002")


def agent(served: Served, node: str) -> None:
    """An agent of this node registers and reports."""
    part = PartIdentity(position=f"{node}/npu0/die0", logic_id=0, device_ip="192.0.2.1")
    registration = AgentRegistration(node=node, version="1", drivers=("simulated",), parts=(part,))
    put(served, keys.registration(node), registration)
    put(served, keys.health(node), AgentHealth(node=node, boot_id="b", sequence=1))


async def changes(stream: Any, until: Any) -> list[Any]:
    """Messages until one that fits, which is the last."""
    found = [await stream.read()]
    while not until(found[-1]):
        found.append(await stream.read())
    return found


async def test_nodes_are_told_as_the_leader_believes_them(served: Served) -> None:
    """All nodes first; then the one whose agent came, and no other, without a request for it."""
    stream = served.stub().WatchNodes(scheduler_pb2.WatchNodesRequest())
    nodes = list(load_machine("nvl72").node_names())
    first = await snapshot(stream)
    assert [message.node.node for message in first] == nodes
    assert {message.node.state for message in first} == {"ABSENT"}
    agent(served, nodes[3])
    seen = await changes(stream, lambda message: message.node.state == "READY")
    assert {message.node.node for message in seen} == {nodes[3]}
    assert {message.kind for message in seen} == {CHANGED}
    assert list(seen[-1].node.drivers) == ["simulated"]
    assert not seen[-1].dies


async def test_dies_come_with_their_node(served: Served) -> None:
    """A hold on one die tells its node with all dies, the reason, and the silicon found there."""
    node = "sn0/n01"
    agent(served, node)
    stream = served.stub().WatchNodes(scheduler_pb2.WatchNodesRequest(dies=True))
    await snapshot(stream)
    request = scheduler_pb2.CordonRequest(
        subject=f"{node}/npu0/die0", message="pod a/b", reason="HELD_BY_OTHER"
    )
    await served.stub().Cordon(request)
    held = (await changes(stream, lambda message: message.node.dies_held == 1))[-1]
    assert [die.why.reason for die in held.dies if die.hold] == ["HELD_BY_OTHER"]
    assert held.dies[0].part.device_ip == "192.0.2.1"
    assert held.node.node == node
    await served.stub().Uncordon(scheduler_pb2.UncordonRequest(subject=request.subject))
    await changes(stream, lambda message: message.node.dies_held == 0)


async def test_a_die_is_told_with_the_pod_that_holds_it(served: Served) -> None:
    """What kubelet said to the agent goes on to whoever knows whose pod that is."""
    node = "sn0/n01"
    agent(served, node)
    stream = served.stub().WatchNodes(scheduler_pb2.WatchNodesRequest(dies=True))
    await snapshot(stream)
    holders = (DieHolder(die=f"{node}/npu1/die0", pod="a/training"),)
    put(served, keys.health(node), AgentHealth(node=node, boot_id="b", holders=holders))
    (*_, seen) = await changes(stream, lambda message: any(die.holder for die in message.dies))
    assert {die.die: die.holder for die in seen.dies if die.holder} == {
        f"{node}/npu1/die0": "a/training"
    }


async def test_a_reason_of_a_cordon_is_a_code(served: Served) -> None:
    """A sentence is no reason."""
    request = scheduler_pb2.CordonRequest(subject="sn0/n00", reason="because")
    error = await refusal(served.stub().Cordon(request))
    assert error.reason is Reason.INVALID_ARGUMENT
    assert "reason" in error.message


async def test_a_hold_on_the_supernode_touches_all_its_nodes(served: Served) -> None:
    """Each node is told held."""
    stream = served.stub().WatchNodes(scheduler_pb2.WatchNodesRequest())
    names = {message.node.node for message in await snapshot(stream)}
    await served.stub().Cordon(scheduler_pb2.CordonRequest(subject="sn0"))
    held: set[str] = set()
    while held != names:
        message = await stream.read()
        if message.node.dies_held == message.node.dies:
            held.add(message.node.node)


async def test_a_node_that_is_no_part_of_the_machine_any_more_is_deleted(served: Served) -> None:
    """A smaller description takes nodes away."""
    stream = served.stub().WatchNodes(scheduler_pb2.WatchNodesRequest())
    names = [message.node.node for message in await snapshot(stream)]
    smaller = to_message(load_machine("nvl72"), topology_pb2.SuperNode)
    smaller.nodes -= 1
    await served.stub().ApplySuperNode(scheduler_pb2.ApplySuperNodeRequest(supernode=smaller))
    gone = (await changes(stream, lambda message: message.kind == DELETED))[-1]
    assert gone.node == scheduler_pb2.NodeStatus(node=names[-1])


async def test_a_watch_of_nodes_ends_with_the_leadership(served: Served) -> None:
    """A process that leads no more tells nothing of nodes: it would be old."""
    stream = served.stub().WatchNodes(scheduler_pb2.WatchNodesRequest())
    await snapshot(stream)
    leader, served.replica.leader = served.replica.leader, None
    agent(served, "sn0/n00")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    served.replica.leader = leader
    assert error_from(caught.value).reason is Reason.NO_LEADER
