"""The machine on a real API server: shares, cordons, drains, lost nodes, and what shows of dies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raddle.v1 import health_pb2, scheduler_pb2
from tests.operator.conftest import Stage

pytestmark = pytest.mark.asyncio(loop_scope="module")
NODES = 16


def resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "raddle.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


async def shares(stage: Stage) -> dict[str, list[str]]:
    data = await stage.data("raddle-nodes")
    return {host: text.split(",") for host, text in data.items() if text}


async def node_status(stage: Stage, node: str) -> scheduler_pb2.NodeStatus:
    answer = await stage.call("ListNodes", scheduler_pb2.ListNodesRequest())
    found: scheduler_pb2.NodeStatus = next(n for n in answer.nodes if n.node == node)
    return found


async def holds(stage: Stage, node: str) -> set[tuple[str, str]]:
    """(kind, reason) of all holds on the dies of a node."""
    answer = await stage.call("ListDies", scheduler_pb2.ListDiesRequest(node=node))
    return {(hold.kind, hold.reason) for die in answer.dies for hold in die.holds}


async def test_the_machine_is_shared_out_equally(stage: Stage) -> None:
    """Each node of the machine is one Kubernetes node's; what both have is as it was."""

    async def equal() -> bool:
        return sorted(len(nodes) for nodes in (await shares(stage)).values()) == [8, 8]

    await stage.until(equal, "two shares of eight")
    found = await shares(stage)
    assert set(found) == {"worker-1", "worker-2"}
    assert len({node for nodes in found.values() for node in nodes}) == NODES


async def test_a_cordon_is_honoured_and_lifted(stage: Stage) -> None:
    """No new work on any node that the Kubernetes node plays, until it is uncordoned."""
    node = (await shares(stage))["worker-1"][0]
    await stage.kubectl("cordon", "worker-1")

    async def cordoned() -> bool:
        return ("CORDON", "HOST_CORDONED") in await holds(stage, node)

    await stage.until(cordoned, "the scheduler knows of the cordon")
    other = (await shares(stage))["worker-2"][0]
    assert not await holds(stage, other)
    await stage.kubectl("uncordon", "worker-1")

    async def lifted() -> bool:
        return not await holds(stage, node)

    await stage.until(lifted, "the cordon is lifted")


async def test_a_cordon_of_an_administrator_stays(stage: Stage) -> None:
    """What others hold is theirs to lift."""
    node = (await shares(stage))["worker-1"][1]
    await stage.call("Cordon", scheduler_pb2.CordonRequest(subject=node, message="fan noise"))
    await stage.kubectl("cordon", "worker-1")
    beside = (await shares(stage))["worker-1"][2]

    async def cordoned() -> bool:
        return ("CORDON", "HOST_CORDONED") in await holds(stage, beside)

    await stage.until(cordoned, "its neighbour is cordoned")
    await stage.kubectl("uncordon", "worker-1")

    async def lifted() -> bool:
        return not await holds(stage, beside)

    await stage.until(lifted, "the neighbour's cordon is lifted")
    assert await holds(stage, node) == {("CORDON", "CORDON")}
    await stage.call("Uncordon", scheduler_pb2.UncordonRequest(subject=node))


async def test_a_taint_that_evicts_drains(stage: Stage) -> None:
    """And its end ends the drain."""
    node = (await shares(stage))["worker-2"][0]
    await stage.kubectl("taint", "node", "worker-2", "repair=now:NoExecute")

    async def draining() -> bool:
        return ("DRAIN", "DRAIN") in await holds(stage, node)

    await stage.until(draining, "the node is drained")
    await stage.kubectl("taint", "node", "worker-2", "repair:NoExecute-")

    async def over() -> bool:
        return not await holds(stage, node)

    await stage.until(over, "the drain is over")


async def test_the_state_of_dies_shows_on_their_kubernetes_node(stage: Stage) -> None:
    """As a condition, and in a ConfigMap for other tools."""
    node = (await shares(stage))["worker-1"][0]
    await stage.until_condition("worker-1", "RaddleDiesHealthy", "True", of="Node")
    request = scheduler_pb2.InjectFaultRequest(
        subject=f"{node}/npu0/die1", code="80E18005", level=health_pb2.FAULT_LEVEL_SEPARATE_NPU
    )
    await stage.call("InjectFault", request)
    await stage.until_condition(
        "worker-1", "RaddleDiesHealthy", "False", reason="DiesFaulty", of="Node"
    )
    message = (await stage.condition("worker-1", "RaddleDiesHealthy", "Node", ""))["message"]
    assert f"{node}/npu0/die1 SEPARATE_NPU" in message

    async def listed() -> bool:
        text = (await stage.data("raddle-dies-sn0")).get(node.replace("/", "."), "{}")
        dies = {die["die"]: die for die in json.loads(text).get("dies", ())}
        return bool(dies.get(f"{node}/npu0/die1", {}).get("health") == "SEPARATE_NPU")

    await stage.until(listed, "the ConfigMap says so")
    request.clear = True
    await stage.call("InjectFault", request)
    await stage.until_condition("worker-1", "RaddleDiesHealthy", "True", of="Node")
    ready = await stage.condition("worker-1", "Ready", "Node", "")
    assert ready["reason"] == "Said"


async def test_a_supernode_is_applied_and_counted(stage: Stage) -> None:
    """A description that the scheduler refuses says why; one that it knows is counted."""
    answer = await stage.call("ListNodes", scheduler_pb2.ListNodesRequest())
    machine = stage.raddle.supernode
    spec = {
        "machine": machine.machine,
        "nodes": machine.nodes,
        "npusPerNode": machine.npus_per_node,
        "diesPerNpu": machine.dies_per_npu,
        "cpusPerNode": machine.cpus_per_node,
        "nodesPerRack": machine.nodes_per_rack,
        "computeRacks": machine.compute_racks,
        "communicationRacks": machine.communication_racks,
        "ubPlanes": machine.ub_planes,
        "switchChipsPerNode": machine.switch_chips_per_node,
        "dieMemoryBytes": machine.die_memory_bytes,
        "hostMemoryBytes": machine.host_memory_bytes,
        "dieToDieBytesPerS": machine.die_to_die_bytes_per_s,
        "dieToHostBytesPerS": machine.die_to_host_bytes_per_s,
        "nodeNetworkBytesPerS": machine.node_network_bytes_per_s,
        "bucketBytesPerS": machine.bucket_bytes_per_s,
    }
    await stage.apply(resource("SuperNode", "sn0", spec))
    await stage.until_condition("sn0", "Applied", "True", of="SuperNode")

    async def counted() -> bool:
        status = (await stage.resource("sn0", "SuperNode", ""))["status"]
        return bool(status.get("nodesReady") == status.get("nodes") == len(answer.nodes))

    await stage.until(counted, "all nodes are ready")
    await stage.apply(resource("SuperNode", "sn0", spec | {"nodes": 99}))
    await stage.until_condition("sn0", "Applied", "False", of="SuperNode")
    message = (await stage.condition("sn0", "Applied", "SuperNode", ""))["message"]
    assert "99 nodes do not fit" in message
    await stage.kubectl("delete", "sn", "sn0")


async def test_a_maintenance_drains_and_ends_with_its_resource(stage: Stage) -> None:
    """Drained when nothing runs there; deleted, the subject takes work again."""
    await stage.apply(resource("Maintenance", "fans", {"subject": "sn0/n03", "timeout": "600s"}))
    await stage.until_condition("fans", "Drained", "True", of="Maintenance")
    status = (await stage.resource("fans", "Maintenance", ""))["status"]
    assert (status["state"], status["ranksTotal"]) == ("DRAINED", 0)
    assert ("DRAIN", "DRAIN") in await holds(stage, "sn0/n03")
    await stage.apply(resource("Maintenance", "again", {"subject": "sn0/n03"}))
    await stage.until_condition(
        "again", "Drained", "False", reason="AlreadyExists", of="Maintenance"
    )
    await stage.kubectl("delete", "mt", "again")
    assert ("DRAIN", "DRAIN") in await holds(stage, "sn0/n03")
    await stage.kubectl("delete", "mt", "fans")
    assert not await holds(stage, "sn0/n03")


async def test_a_new_kubernetes_node_gets_its_share_when_the_old_agents_are_silent(
    stage: Stage,
) -> None:
    """Taken first; given only once nobody plays it any more."""
    before = await shares(stage)
    await stage.add_node("worker-3", "192.0.2.3", {})

    async def taken() -> bool:
        found = await shares(stage)
        return len(found["worker-1"]) < 8 or len(found["worker-2"]) < 8

    await stage.until(taken, "something is taken")
    found = await shares(stage)
    assert "worker-3" not in found
    assert set(found["worker-1"]) <= set(before["worker-1"])
    assert set(found["worker-2"]) <= set(before["worker-2"])
    await stage.kubectl("delete", "node", "worker-3")

    async def back() -> bool:
        return sum(len(nodes) for nodes in (await shares(stage)).values()) == NODES

    # Their agents were never told to go, so they are heard, and nobody is given them.
    assert not await back()


async def test_a_lost_kubernetes_node_is_the_second_witness(stage: Stage) -> None:
    """Many silent nodes are unknown until their Kubernetes node goes; then they are lost."""
    await stage.kubectl("label", "node", "worker-2", "x=y")
    played = (await shares(stage))["worker-2"]
    for name in [n for n in stage.raddle.children if n.startswith("agent-simulated")]:
        child = stage.raddle.children.pop(name)
        child.process.kill()
        child.process.wait()

    async def unknown() -> bool:
        return (await node_status(stage, played[0])).state == "UNKNOWN"

    await stage.until(unknown, "the storm brake holds")
    await stage.kubectl("delete", "node", "worker-2")

    async def lost() -> bool:
        found = await node_status(stage, played[0])
        return found.state == "LOST" and found.why.reason == "DECLARED_LOST"

    await stage.until(lost, "it is declared lost")
    assert (
        "its Kubernetes node worker-2 is gone" in (await node_status(stage, played[0])).why.message
    )
    kept = (await shares(stage))["worker-1"]
    assert (await node_status(stage, kept[0])).state == "UNKNOWN"
